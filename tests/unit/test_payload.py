"""Payloads: which values go through, typed, and what a value that does not is told."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypedDict
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toque._payload import (
    PAYLOAD_MAX,
    check_type,
    decode,
    decode_params,
    encode,
    return_type,
    to_json,
    to_msgpack,
)
from toque.errors import InvalidPayload, MisuseError, PayloadTooLarge


class Colour(Enum):
    RED = "red"


class Point(msgspec.Struct):
    x: int
    y: int = 0


@dataclass
class Page:
    url: str
    links: list[str] = field(default_factory=list)
    at: datetime | None = None


class Pair(NamedTuple):
    left: int
    right: str


class Row(TypedDict):
    id: int


class User(pydantic.BaseModel):
    user_id: int = pydantic.Field(alias="userId")
    home: Path = Path("/")
    tags: set[str] = set()

    @pydantic.computed_field  # type: ignore[prop-decorator]  # pydantic's own documented form
    @property
    def label(self) -> str:
        return f"user {self.user_id}"


class Site(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    address: pydantic.HttpUrl
    owner: User


@dataclass
class Visit:
    user: User
    others: list[User]
    best: User | None = None


class Secret(pydantic.BaseModel):
    password: pydantic.SecretStr


class Stubborn(pydantic.BaseModel):
    @pydantic.model_serializer
    def refuse(self) -> dict[str, Any]:
        raise KeyError("nothing")


def round_trip(value: Any, type_: Any) -> Any:
    return decode(encode(value, what="the result"), type_, what="the result")


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


# -- values that go through --------------------------------------------------------------------------------------------

@given(plain_values)
def test_plain_values_come_back_equal_without_a_type(value):
    """What JSON and msgpack know needs no annotation."""
    assert round_trip(value, Any) == value


@pytest.mark.parametrize(("value", "type_"), [
    (datetime(2024, 2, 29, 12, tzinfo=UTC), datetime), (timedelta(hours=1), timedelta), (Decimal("1.10"), Decimal),
    (UUID(int=5), UUID), (Colour.RED, Colour), ((1, "a"), tuple[int, str]), ({1, 2}, set[int]), (b"\x00\xff", bytes),
    (frozenset({1}), frozenset[int]), (Point(1), Point), (Page("u", ["v"], datetime(2024, 1, 1, tzinfo=UTC)), Page),
    (Pair(1, "b"), Pair), ({"id": 1}, Row), ({Colour.RED: [Point(1)]}, dict[Colour, list[Point]]), (None, None),
    (PurePosixPath("/a/b"), PurePosixPath), (Path("a"), Path), (IPv4Address("10.0.0.1"), IPv4Address),
], ids=lambda value: type(value).__name__)
def test_typed_values_come_back_by_annotation(value, type_):
    """The annotation says what the plain value was."""
    assert round_trip(value, type_) == value


@pytest.mark.parametrize(("value", "type_"), [
    (User(userId=1, tags={"a"}), User),
    ([User(userId=1)], list[User]),
    ({"a": User(userId=1)}, dict[str, User]),
    (Visit(User(userId=1), [User(userId=2)], User(userId=3)), Visit),
    (Site(address="https://example.org/a", owner=User(userId=1)), Site),
    (None, User | None),
    (User(userId=4), User | None),
], ids=["top", "list", "dict", "dataclass", "nested", "none", "optional"])
def test_pydantic_models_come_back_at_the_top_and_inside(value, type_):
    """Models go by their own dump and validation, whatever aliases and computed fields they have."""
    assert round_trip(value, type_) == value


def test_a_model_is_read_from_json_by_alias():
    """Plain creations are written by people who know the model's outer names."""
    user = decode_params(b'{"userId": 7, "home": "/root"}', "application/json", User, what="params")

    assert user == User(userId=7, home=Path("/root"))


def test_nan_goes_through():
    """Floats are floats, also those that are no number."""
    assert math.isnan(round_trip(float("nan"), float))


def test_dumping_a_model_prints_no_values(recwarn):
    """pydantic's warnings quote values, so they are switched off."""
    odd = User.model_construct(user_id="not a number")
    warnings.simplefilter("always")

    encode(odd, what="the result")

    assert [str(warning.message) for warning in recwarn] == []


# -- values that are refused -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("value", "place", "reason"), [
    (object(), "", "a value of type object cannot be encoded"),
    ({"rows": [1, {"x": object()}]}, " (at ['rows'][1]['x'])", "a value of type object cannot be encoded"),
    (Page("u", [object()]), " (at .links[0])", "a value of type object cannot be encoded"),
    (Point(lambda: 1), " (at .x)", "a value of type function cannot be encoded"),
    (["a", "\ud800"], " (at [1])", "a text with a lone surrogate is no UTF-8"),
    ((1, 2**64), " (at [1])", "can't serialize ints < -2**63 or > 2**64 - 1"),
    (Secret(password="hunter2"), "", "a value of type pydantic.types.SecretStr cannot be encoded"),
    (Stubborn(), "", "model_dump of"),
    ((number for number in [1]), "", "a value of type generator cannot be encoded"),
], ids=["object", "nested", "dataclass", "struct", "surrogate", "integer", "secret", "serializer", "generator"])
def test_a_value_that_cannot_be_encoded_is_told_where_and_why(value, place, reason):
    """The message names what was encoded, the place in it and the type, and never the value."""
    with pytest.raises(InvalidPayload) as caught:
        encode(value, what="the result of step 'a'")

    message = str(caught.value)
    assert message.startswith(f"the result of step 'a' cannot be encoded{place}: {reason}")
    assert "hunter2" not in message


def test_a_value_that_contains_itself_is_refused():
    """Recursion ends in an error of ours."""
    endless: list[Any] = []
    endless.append(endless)

    with pytest.raises(InvalidPayload, match="nested too deeply, or contains itself"):
        encode(endless, what="the result")


def test_a_payload_above_the_limit_is_refused_with_both_figures():
    """The encoded size counts, and the limit itself is still legal."""
    fits = b"x" * (PAYLOAD_MAX - 5)

    assert len(encode(fits, what="params")) == PAYLOAD_MAX
    with pytest.raises(PayloadTooLarge, match=r"params takes 1,048,577 bytes encoded, but at most 1,048,576") as caught:
        encode(fits + b"x", what="params")
    assert (caught.value.size, caught.value.limit) == (PAYLOAD_MAX + 1, PAYLOAD_MAX)


def test_the_limit_may_be_lower():
    """A server that takes less gives the figure."""
    with pytest.raises(PayloadTooLarge, match="at most 10 are allowed"):
        encode("x" * 20, what="params", limit=10)


@pytest.mark.parametrize("data", [
    b"", b"\x91", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xa2\xff\xff", b"\xc1",
    b"\xc0\xc0", b"\x91" * 100_000, b"\x81\x80\x01",
], ids=["empty", "cut", "list", "dict", "bytes", "utf8", "reserved", "trailing", "deep", "dict-key"])
@pytest.mark.parametrize("type_", [Any, list[int], Page, User], ids=["Any", "list", "dataclass", "model"])
def test_damaged_bytes_are_refused(data, type_):
    """Whatever comes in, the error is ours, and claimed sizes allocate nothing."""
    with pytest.raises(InvalidPayload, match="params cannot be decoded"):
        decode(data, type_, what="params")


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_refused(data):
    """No other error can come out of bytes."""
    try:
        decode(data, Visit, what="params")
    except InvalidPayload as error:
        assert str(error).startswith("params cannot be decoded")


@pytest.mark.parametrize(("value", "type_", "message"), [
    ({"url": 5}, Page, "as test_payload.Page: Expected `str`, got `int` - at `$.url`"),
    ({}, Point, "Object missing required field `x`"),
    ({"user": {"userId": "hunter2"}, "others": []}, Visit, "userId: Input should be a valid integer"),
    ({"user": {"userId": "hunter2"}, "others": []}, Visit, "at `$.user`"),
    (5, User, "Input should be a valid dictionary or instance of User"),
], ids=["dataclass", "struct", "model", "model-place", "no-dict"])
def test_a_value_of_another_type_is_told_the_place(value, type_, message):
    """The message has the type, the place and what was expected there, and not the value."""
    with pytest.raises(InvalidPayload) as caught:
        round_trip(value, type_)

    assert message in str(caught.value).replace(__name__, "test_payload")
    assert "hunter2" not in str(caught.value)


def test_long_complaints_of_a_model_are_cut():
    """Five complaints are shown, and how many more there are."""
    many = pydantic.create_model("Many", **{f"f{number}": (int, ...) for number in range(9)})

    with pytest.raises(InvalidPayload, match=r"f4: Field required \(and 4 more\)"):
        round_trip({}, many)


# -- params, by content type -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("data", "content_type"), [
    (b'{"x": 1}', ""), (b'{"x": 1}', "application/json"), (b'{"x": 1}', "Application/JSON; charset=utf-8"),
    (b"\x81\xa1x\x01", "application/msgpack"),
])
def test_params_are_read_by_their_content_type(data, content_type):
    """JSON is the default; msgpack by header."""
    assert decode_params(data, content_type, Point, what="params") == Point(1)


@pytest.mark.parametrize("content_type", ["", "application/msgpack"])
def test_no_params_are_none(content_type):
    """An empty body is a creation without params."""
    assert decode_params(b"", content_type, Any, what="params") is None
    assert decode_params(b"", content_type, Point | None, what="params") is None


@pytest.mark.parametrize("data", [b"{", b"\xff", b"nul", b"[" * 100_000, b'{"x": 1} x', b'{"x": 1e999}', b"null"])
def test_json_that_does_not_fit_is_refused(data):
    """Malformed, cut, too deep or of another type: the error is ours."""
    with pytest.raises(InvalidPayload, match="params cannot be decoded"):
        decode_params(data, "", Point, what="params")


def test_another_content_type_is_refused():
    """The message lists the legal ones."""
    with pytest.raises(InvalidPayload, match="'text/plain'; legal are application/json and application/msgpack"):
        decode_params(b"x", "text/plain", Any, what="params")


# -- JSON for people, msgpack for the journal --------------------------------------------------------------------------

@pytest.mark.parametrize(("value", "text"), [
    ({"a": [1, None, True, "é"]}, '{"a":[1,null,true,"é"]}'),
    (b"\x00\xff", '"AP8="'),
    (float("nan"), "null"),
    ({1: 2}, '{"1":2}'),
    ({(1, 2): b"x"}, '{"(1, 2)":"eA=="}'),
    (datetime(2024, 1, 1, tzinfo=UTC), '"2024-01-01T00:00:00Z"'),
    (msgspec.msgpack.Ext(5, b"x"), '{"ext":5,"data":"eA=="}'),
    ([{(1,): {(2,): 3}}], '[{"(1,)":{"(2,)":3}}]'),
])
def test_every_payload_can_be_shown_as_json(value, text):
    """Whatever msgpack holds has a JSON form."""
    assert to_json(msgspec.msgpack.encode(value)).decode() == text


def test_a_payload_too_deep_for_json_is_refused():
    """Keys that need rewriting, nested beyond what can be walked: the error is ours."""
    depth = 900 if sys.version_info < (3, 12) else 3_000  # decoded, but not walked: frames of C count no more
    nested = b"\x91" * depth + msgspec.msgpack.encode({(1,): 2})

    with pytest.raises(InvalidPayload):
        to_json(nested)


def test_json_becomes_msgpack():
    """The other way, for params that come as text."""
    assert to_msgpack(b'{"x": 1}') == b"\x81\xa1x\x01"


@pytest.mark.parametrize("text", [b"{", b"\xff", b'{"x": 99999999999999999999999}'])
def test_json_that_msgpack_cannot_hold_is_refused(text):
    """Malformed text and integers beyond 64 bits are refused."""
    with pytest.raises(InvalidPayload):
        to_msgpack(text)


# -- types -------------------------------------------------------------------------------------------------------------

class Unknown:
    pass


def test_a_type_that_nothing_can_be_decoded_to_is_known_beforehand():
    """A union that msgspec cannot tell apart is refused before any work is done."""
    with pytest.raises(InvalidPayload, match="Type unions"):
        check_type(int | User, what="params")


def test_a_class_that_nobody_can_decode_is_named():
    """A plain class has no encoding."""
    with pytest.raises(InvalidPayload, match=r"Unknown is not a type that values can be decoded to"):
        round_trip({}, Unknown)


def test_a_return_annotation_that_cannot_be_decoded_to_is_misuse():
    """The step learns it before its callback is entered."""
    def callback() -> int | User: ...

    with pytest.raises(MisuseError, match=r"the return annotation of .*callback: the result cannot be decoded as int"):
        return_type(callback)


def test_many_types_do_not_grow_the_cache_without_bound(monkeypatch):
    """A program that makes types keeps a bounded number of decoders."""
    monkeypatch.setattr("toque._payload.DECODERS_MAX", 3)
    monkeypatch.setattr("toque._payload._decoders", cache := {})

    for number in range(10):
        made = msgspec.defstruct(f"S{number}", [("x", int)])
        assert round_trip({"x": number}, made).x == number

    assert len(cache) <= 3


def test_an_annotation_that_cannot_be_hashed_is_decoded():
    """It is only slower."""
    from typing import Annotated

    assert round_trip(5, Annotated[int, ["unhashable"]]) == 5


def test_an_iterator_annotation_is_told_apart_from_a_value():
    """A generator's items would be lost, so its annotation is refused when a result comes."""
    with pytest.raises(InvalidPayload):
        round_trip([1], Iterator[int])
