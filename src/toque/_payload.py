"""Values to msgpack and back: params, results and outputs, typed by annotation, checked for size, never pickled.

pydantic models are known by their methods; pydantic itself is never imported here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from itertools import islice
from pathlib import PurePath
from typing import Any

import msgspec

from toque._annotations import annotated_return
from toque._failures import describe_exception
from toque.errors import InvalidPayload, MisuseError, PayloadTooLarge
from toque.storage.records import MESSAGE_RESERVE

__all__ = ["JSON", "MSGPACK", "PAYLOAD_MAX", "check_type", "decode", "decode_params", "describe_exception", "encode",
           "msgpack_from", "payload_max", "return_type", "to_json", "to_msgpack"]

PAYLOAD_MAX = 1024 * 1024
DECODERS_MAX = 1024
PLACE_DEPTH_MAX = 20
PLACE_ITEMS_MAX = 10_000
ERRORS_SHOWN_MAX = 5

JSON = "application/json"
MSGPACK = "application/msgpack"

_TEXT_TYPES = (PurePath, IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network)
_URL_MODULES = ("pydantic.networks", "pydantic_core._pydantic_core")  # their values are URLs; secrets live elsewhere
_CODEC_ERRORS = (msgspec.MsgspecError, TypeError, ValueError, NameError, OverflowError, RecursionError)


class _Refused(ValueError):
    """A hook cannot go on; carries what to say about the value, never the value. msgspec adds the place."""


def payload_max(max_payload: int) -> int:
    """How large params, a result or an output may be at a server that takes messages of `max_payload` bytes."""
    return min(PAYLOAD_MAX, max_payload - MESSAGE_RESERVE)


# -- encoding ----------------------------------------------------------------------------------------------------------

def encode(value: Any, *, what: str, limit: int = PAYLOAD_MAX) -> bytes:
    """The value as msgpack; `what` names it in errors. Raises InvalidPayload, PayloadTooLarge."""
    try:
        data = _encode(value)
    except _CODEC_ERRORS as error:
        raise InvalidPayload(_cannot_encode(value, what, error)) from error
    if len(data) > limit:
        raise PayloadTooLarge(f"{what} takes {len(data):,} bytes encoded, but at most {limit:,} are allowed; store it "
                              "elsewhere and pass a reference", size=len(data), limit=limit)
    return data


def _to_plain(value: Any) -> Any:
    """What msgspec does not know: pydantic models, paths, addresses, URLs."""
    dump = getattr(type(value), "model_dump", None)
    if dump is not None:
        return _dumped(dump, value)
    if isinstance(value, _TEXT_TYPES) or type(value).__module__ in _URL_MODULES:
        return str(value)
    raise _Refused(f"a value of type {_type_name(type(value))} cannot be encoded")


def _dumped(dump: Callable[..., Any], value: Any) -> Any:
    """By field name and in a form that validates again, whatever aliases and computed fields the model has.

    Without pydantic's warnings, because they print values.
    """
    try:
        return dump(value, mode="python", by_alias=False, round_trip=True, warnings=False)
    except Exception as error:  # the model's own serializers are user code
        raise _Refused(f"model_dump of {_type_name(type(value))} raised {type(error).__name__}") from error


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_plain)
_encode = _encoder.encode


def _cannot_encode(value: Any, what: str, error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return f"{what} cannot be encoded: it is nested too deeply, or contains itself"
    place, culprit = _locate(value)
    reason = str(error) if isinstance(error, (_Refused, OverflowError)) else _reason(error, culprit)
    where = f" (at {place})" if place else ""
    return f"{what} cannot be encoded{where}: {reason}; return or pass plain values, structs, dataclasses or models"


def _reason(error: BaseException, culprit: Any) -> str:
    if isinstance(error, UnicodeError):
        return "a text with a lone surrogate is no UTF-8"
    return f"{error} in a value of type {_type_name(type(culprit))}"


def _locate(value: Any) -> tuple[str, Any]:
    """The path to the innermost part that cannot be encoded, and that part."""
    place = ""
    for _ in range(PLACE_DEPTH_MAX):
        for name, part in islice(_parts(value), PLACE_ITEMS_MAX):
            if not _encodes(part):
                place, value = place + name, part
                break
        else:
            break
    return place, value


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r:.40}]", part) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", part) for index, part in enumerate(value)]
    fields: Iterable[str] = getattr(value, "__struct_fields__", ()) or getattr(value, "__dataclass_fields__", ())
    return [(f".{field}", getattr(value, field, None)) for field in fields]


def _encodes(value: Any) -> bool:
    try:
        _encode(value)
    except _CODEC_ERRORS:
        return False
    return True


# -- decoding ----------------------------------------------------------------------------------------------------------

def decode(data: bytes, type_: Any, *, what: str) -> Any:
    """The value of a msgpack text, as `type_`. Raises InvalidPayload, naming `what` and the place."""
    try:
        return _decoder(type_)(data)
    except (*_CODEC_ERRORS, MemoryError) as error:
        raise InvalidPayload(_cannot_decode(type_, what, error)) from error


def decode_params(data: bytes, content_type: str, type_: Any, *, what: str) -> Any:
    """The params of a creation: JSON (also when `content_type` is empty) or msgpack. No bytes at all mean None.

    Raises InvalidPayload, also for another content type.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in ("", JSON, MSGPACK):
        raise InvalidPayload(f"{what} have the content type {media_type!r:.80}; legal are {JSON} and {MSGPACK}")
    if media_type == MSGPACK:
        return decode(data or b"\xc0", type_, what=what)
    try:
        return _json_decoder(type_)(data or b"null")
    except _CODEC_ERRORS as error:
        raise InvalidPayload(_cannot_decode(type_, what, error)) from error


def return_type(fn: Callable[..., Any]) -> Any:
    """The type to decode a callback's result to: its return annotation, Any without one.

    Raises MisuseError, before the callback does any work, for an annotation that is unknown or cannot be decoded to.
    """
    type_ = annotated_return(fn)
    try:
        check_type(type_, what="the result")
    except InvalidPayload as error:
        name = getattr(fn, "__qualname__", type(fn).__qualname__)
        raise MisuseError(f"the return annotation of {name}: {error}") from error
    return type_


def check_type(type_: Any, *, what: str) -> None:
    """Raises InvalidPayload when nothing can be decoded to the type, so that this is known before any work is done."""
    try:
        _decoder(type_)
    except _CODEC_ERRORS as error:
        raise InvalidPayload(_cannot_decode(type_, what, error)) from error


_Decode = Callable[[bytes], Any]
_decoders: dict[Any, _Decode] = {}
_json_decoders: dict[Any, _Decode] = {}


def _decoder(type_: Any) -> _Decode:
    try:
        return _decoders[type_]
    except (KeyError, TypeError):
        return _remember(_decoders, type_, msgspec.msgpack.Decoder(type_, dec_hook=_from_plain).decode)


def _json_decoder(type_: Any) -> _Decode:
    try:
        return _json_decoders[type_]
    except (KeyError, TypeError):
        return _remember(_json_decoders, type_, msgspec.json.Decoder(type_, dec_hook=_from_plain).decode)


def _remember(cache: dict[Any, _Decode], type_: Any, made: _Decode) -> _Decode:
    """Keep it, if the type can be a key; a full cache is begun anew."""
    if len(cache) >= DECODERS_MAX:
        cache.clear()
    try:
        cache[type_] = made
    except TypeError:  # an annotation that cannot be hashed is decoded without the cache
        return made
    return made


def _from_plain(type_: Any, value: Any) -> Any:
    """The other way of `_to_plain`."""
    validate = getattr(type_, "model_validate", None)
    if validate is not None:
        return _validated(type_, validate, value)
    if isinstance(type_, type) and issubclass(type_, _TEXT_TYPES) and isinstance(value, str):
        return type_(value)
    if isinstance(type_, type) and type_.__module__ in _URL_MODULES and isinstance(value, str):
        return type_(value)
    if isinstance(type_, type) and isinstance(value, type_):
        return value
    raise _Refused(f"{_type_name(type_)} is not a type that values can be decoded to")


def _validated(type_: Any, validate: Callable[..., Any], value: Any) -> Any:
    options = {"by_alias": True, "by_name": True} if "by_name" in inspect.signature(validate).parameters else {}
    try:
        return validate(value, **options)
    except Exception as error:  # the model's own validators are user code
        raise _Refused(f"{_type_name(type_)}: {_model_errors(error)}") from error


def _model_errors(error: Exception) -> str:
    """pydantic's complaints without the input they complain about."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return type(error).__name__
    found = errors(include_url=False, include_context=False, include_input=False)
    shown = [f"{'.'.join(str(part) for part in item['loc']) or 'value'}: {item['msg']}" for item in found]
    more = f" (and {len(shown) - ERRORS_SHOWN_MAX} more)" if len(shown) > ERRORS_SHOWN_MAX else ""
    return "; ".join(shown[:ERRORS_SHOWN_MAX]) + more


def _cannot_decode(type_: Any, what: str, error: BaseException) -> str:
    if isinstance(error, (RecursionError, MemoryError)):
        return f"{what} cannot be decoded: nested too deeply, or cut"
    if isinstance(error, UnicodeError):
        return f"{what} cannot be decoded: not UTF-8"
    return f"{what} cannot be decoded as {_type_name(type_)}: {error}"


# -- JSON and msgpack --------------------------------------------------------------------------------------------------

def to_json(msgpack: bytes) -> bytes:
    """The same value as JSON: bytes become base64 text, keys text, NaN null. Raises InvalidPayload."""
    value = decode(msgpack, Any, what="payload")
    try:
        return _json_encode(value)
    except _CODEC_ERRORS:
        return _json_with_text_keys(value)


def to_msgpack(json: bytes) -> bytes:
    """The same value as msgpack. Raises InvalidPayload, PayloadTooLarge."""
    return encode(decode_params(json, JSON, Any, what="payload"), what="payload")


def msgpack_from(data: bytes, content_type: str) -> bytes:
    """A payload from outside as msgpack that certainly decodes; nothing at all means None.

    JSON (also when `content_type` is empty) or msgpack. Raises InvalidPayload, also for another content type.
    """
    value = decode_params(data, content_type, Any, what="the payload")
    if content_type.partition(";")[0].strip().lower() == MSGPACK:
        return data or b"\xc0"
    return encode(value, what="the payload", limit=sys.maxsize)


def _extension_to_plain(value: Any) -> Any:
    if isinstance(value, msgspec.msgpack.Ext):
        return {"ext": value.code, "data": bytes(value.data)}
    raise _Refused(f"a value of type {_type_name(type(value))} cannot be encoded")


_json_encode = msgspec.json.Encoder(enc_hook=_extension_to_plain).encode


def _json_with_text_keys(value: Any) -> bytes:
    """For keys that JSON does not know."""
    try:
        return _json_encode(_with_text_keys(value))
    except _CODEC_ERRORS as error:
        raise InvalidPayload(f"the payload cannot be shown as JSON: {type(error).__name__}") from error


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): _with_text_keys(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_text_keys(part) for part in value]
    return value


def _type_name(type_: Any) -> str:
    if not isinstance(type_, type):
        return str(type_)
    return type_.__qualname__ if type_.__module__ == "builtins" else f"{type_.__module__}.{type_.__qualname__}"
