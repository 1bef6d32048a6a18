"""How a child names its parent, and what tells its creation from any other."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from toque._names import is_instance_id
from toque.errors import InvalidName
from toque.storage import records as r
from toque.storage.family import Parent, child_id, child_nonce

ADMITTED = r.Admitted(1, 1, 1, 0, "census", "one", "n", 1, 7, b"{}", "application/json")
KEY = "5:1:leaf"


@pytest.mark.parametrize("name", ["leaf", "two words", "100 %", "überall/…", "a+b=c"])
def test_a_parents_text_is_read_as_it_was_written(name):
    """Any step name, in a header that takes printable ASCII only."""
    parent = Parent("census", "one", 2, r.StepKind.CHILD, 3, name)

    assert Parent.parse(parent.text()) == parent
    assert parent.text().isascii() and parent.text().isprintable()
    assert parent.waits and not parent._replace(kind=r.StepKind.START).waits


@pytest.mark.parametrize("text", [
    "", "census", "census one 1 child 1", "census one x child 1 leaf", "census one 1 do 1 leaf", "no! one 1 child 1 leaf",
    "census -one 1 child 1 leaf", "census one 1 child 1 ", "census one 1 child 1 %0A", "census one 1 child 1 leaf more",
])
def test_another_text_names_no_parent(text):
    """Anyone can publish a header."""
    with pytest.raises((ValueError, InvalidName)):
        Parent.parse(text)


@pytest.mark.parametrize("other", [
    {"workflow": "other"}, {"id": "two"}, {"nonce": "m"}, {"created_at": 8}, {"account": "b"}, {"run": 2},
    {"key": "5:2:leaf"},
])
def test_every_part_tells_a_creation_from_others(other: dict[str, Any]):
    """Another account, parent, run or step; and a parent that was deleted and created anew under its id."""
    parts: dict[str, Any] = {"account": "a", "run": 1, "key": KEY}
    mine = tuple(parts.values())
    parts.update((name, value) for name, value in other.items() if name in parts)
    parent = msgspec.structs.replace(ADMITTED, **{name: value for name, value in other.items() if name not in parts})

    for made in (child_nonce, child_id):
        account, run, key = mine
        before = made(account, ADMITTED, run, key)
        assert made(parts["account"], parent, parts["run"], parts["key"]) != before == made(account, ADMITTED, run, key)


@pytest.mark.parametrize("length", [1, 79, 80, 100])
def test_a_childs_id_is_legal_however_long_its_parents_is(length):
    """At most 100 characters, and it begins as its parent's."""
    parent = msgspec.structs.replace(ADMITTED, id="p" * length)

    made = child_id("a", parent, 1, KEY)

    assert is_instance_id(made)
    assert made.startswith("p" * min(length, 79))
