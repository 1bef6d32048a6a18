"""What accounts, workflows, instances, pods and steps may be called, and the ids that Toque makes itself.

All but step names are subject tokens, keys and file names as they stand; so their pattern is narrow, and ASCII only.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b
from typing import TYPE_CHECKING

from toque.errors import InvalidName

if TYPE_CHECKING:
    from toque.storage.ports import Randomness

ACCOUNT_LENGTH_MAX = 32
WORKFLOW_LENGTH_MAX = 64
POD_LENGTH_MAX = 64
INSTANCE_ID_LENGTH_MAX = 100
STEP_LENGTH_MAX = 256
EVENT_TYPE_LENGTH_MAX = 100
NEW_ID_LENGTH = 26

_TOKEN = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_-]*", re.ASCII)
_TOKEN_RULE = "letters a-z and A-Z, digits, '_' and '-', and it must not begin with '-'"
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control, lone surrogate, line and paragraph separator
_SHOWN_MAX = 40

_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: in ASCII order, without i, l, o and u
_PAIRS = [high + low for high in _DIGITS for low in _DIGITS]
_RANDOM_BITS = 80
_PAIR_SHIFTS = tuple(range(120, -1, -10))


def check_account(name: str) -> str:
    """The name itself. Raises InvalidName."""
    return _check_token(name, "account", ACCOUNT_LENGTH_MAX)


def check_workflow(name: str) -> str:
    """The name itself. Raises InvalidName."""
    return _check_token(name, "workflow", WORKFLOW_LENGTH_MAX)


def check_pod(name: str) -> str:
    """The name itself. Raises InvalidName."""
    return _check_token(name, "pod", POD_LENGTH_MAX)


def check_instance_id(id: str) -> str:
    """The id itself. Raises InvalidName."""
    return _check_token(id, "instance id", INSTANCE_ID_LENGTH_MAX)


def is_instance_id(text: str) -> bool:
    """Whether `check_instance_id` would take it."""
    return len(text) <= INSTANCE_ID_LENGTH_MAX and _TOKEN.fullmatch(text) is not None


def check_event_type(type: str) -> str:
    """The type itself. Raises InvalidName."""
    return _check_token(type, "event type", EVENT_TYPE_LENGTH_MAX)


def is_event_type(text: str) -> bool:
    """Whether `check_event_type` would take it."""
    return len(text) <= EVENT_TYPE_LENGTH_MAX and _TOKEN.fullmatch(text) is not None


def approval_type(step: str) -> str:
    """The event type that an approval of this step's name has: "approval-<name>", with a hash where that is not legal."""
    plain = f"approval-{check_step_name(step)}"
    return plain if is_event_type(plain) else f"approval-{blake2b(step.encode(), digest_size=16).hexdigest()}"


def is_workflow(text: str) -> bool:
    """Whether `check_workflow` would take it."""
    return len(text) <= WORKFLOW_LENGTH_MAX and _TOKEN.fullmatch(text) is not None


def check_step_name(name: str) -> str:
    """The name itself: any text of 1 to 256 characters without control characters. Raises InvalidName."""
    _check_text(name, "step name", STEP_LENGTH_MAX)
    if name.isprintable():
        return name
    for index, character in enumerate(name):
        if unicodedata.category(character) in _UNPRINTABLE:
            raise InvalidName(f"step name {_shown(name)} has the control character {character!r} at position {index}; "
                              "legal is any text without control characters and line breaks",
                              kind="step name", name=name)
    return name


def new_instance_id(now_ms: int, rng: Randomness) -> str:
    """A legal id of 26 characters that sorts by `now_ms` (48 bits) and is unique by 80 random bits."""
    value = (now_ms << _RANDOM_BITS) | rng.getrandbits(_RANDOM_BITS)
    return "".join([_PAIRS[(value >> shift) & 1023] for shift in _PAIR_SHIFTS])


def _check_token(name: str, kind: str, length_max: int) -> str:
    if isinstance(name, str) and len(name) <= length_max and _TOKEN.fullmatch(name):
        return name
    _check_text(name, kind, length_max)
    index = next(i for i, character in enumerate(name) if not _TOKEN.fullmatch(character if i else character + "_"))
    raise InvalidName(f"{kind} {_shown(name)} has {name[index]!r} at position {index}; legal are {_TOKEN_RULE}",
                      kind=kind, name=name)


def _check_text(name: str, kind: str, length_max: int) -> None:
    if not isinstance(name, str):
        raise InvalidName(f"{kind} must be a text, not {type(name).__name__}", kind=kind, name=_shown(name))
    if not name:
        raise InvalidName(f"{kind} is empty; legal are 1 to {length_max} characters", kind=kind, name=name)
    if len(name) > length_max:
        raise InvalidName(f"{kind} {_shown(name)} has {len(name)} characters; legal are 1 to {length_max}",
                          kind=kind, name=name)


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "…'"
