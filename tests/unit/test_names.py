"""Names and ids: what is legal, what a wrong one is told, and that made ids sort by time."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toque._names import (
    check_account,
    check_instance_id,
    check_pod,
    check_step_name,
    check_workflow,
    is_instance_id,
    new_instance_id,
)
from toque.errors import InvalidName

TOKEN_CHECKS = [(check_account, "account", 32), (check_workflow, "workflow", 64), (check_pod, "pod", 64),
                (check_instance_id, "instance id", 100)]
each_token = pytest.mark.parametrize(("check", "kind", "longest"), TOKEN_CHECKS)
ILLEGAL = [".", "*", ">", " ", "\n", "\t", "\0", "/", "$", "+", "é", "１", "😀", "\ud800"]


@each_token
@pytest.mark.parametrize("name", ["a", "A", "0", "_", "a-b_c", "9-", "_-"])
def test_a_legal_name_is_returned_as_it_is(check, kind, longest, name):
    """Letters, digits, '_' and '-' are legal, and the longest length is."""
    assert check(name) == name
    assert check("x" * longest) == "x" * longest


@each_token
@pytest.mark.parametrize("character", ILLEGAL)
@pytest.mark.parametrize("form", ["{}", "{}a", "a{}b", "a{}"])
def test_an_illegal_character_is_named_with_its_place(check, kind, longest, character, form):
    """Whatever cannot be a subject token is refused anywhere in the name, at its end too."""
    name = form.format(character)

    with pytest.raises(InvalidName) as caught:
        check(name)

    assert f"has {character!r} at position {name.index(character)}; legal are" in str(caught.value)
    assert (caught.value.kind, caught.value.name) == (kind, name)


@each_token
def test_a_leading_dash_is_refused(check, kind, longest):
    """A name that begins like an option is none."""
    with pytest.raises(InvalidName, match=f"{kind} '-a' has '-' at position 0; legal are .* must not begin with '-'"):
        check("-a")


@each_token
def test_too_long_a_name_is_told_both_lengths(check, kind, longest):
    """The message has the length found and the legal ones, and shows only a part of the name."""
    with pytest.raises(InvalidName, match=f"has 5000 characters; legal are 1 to {longest}") as caught:
        check("x" * 5_000)

    assert len(str(caught.value)) < 200


@each_token
def test_an_empty_name_is_refused(check, kind, longest):
    """There is no default for a name."""
    with pytest.raises(InvalidName, match=f"{kind} is empty"):
        check("")


@each_token
@pytest.mark.parametrize("value", [None, 5, b"a", ["a"]])
def test_what_is_no_text_is_refused_by_its_type(check, kind, longest, value):
    """A number or bytes are not turned into a name."""
    with pytest.raises(InvalidName, match=f"{kind} must be a text, not {type(value).__name__}"):
        check(value)


@given(st.text(max_size=120))
def test_is_instance_id_agrees_with_the_check(text):
    """The question and the check are one rule."""
    try:
        check_instance_id(text)
    except InvalidName:
        assert not is_instance_id(text)
    else:
        assert is_instance_id(text)


@pytest.mark.parametrize("name", ["a", "fetch page 3/7", "größe", "👩‍👩‍👧 family", "a.b*c>", "x" * 256, "a\u00a0b"])
def test_a_step_may_have_any_readable_name(name):
    """Step names are for people; only what breaks a line or a terminal is refused."""
    assert check_step_name(name) == name


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\ud800"])
def test_a_control_character_in_a_step_name_is_named(character):
    """Control characters, line separators and lone surrogates are refused with their place."""
    with pytest.raises(InvalidName, match=r"has the control character .* at position 3;") as caught:
        check_step_name(f"abc{character}")

    assert repr(character) in str(caught.value)


@pytest.mark.parametrize("name", ["", "x" * 257, None, 5])
def test_a_step_name_has_1_to_256_characters(name):
    """The bound is the same as for every reader of the journal."""
    with pytest.raises(InvalidName) as caught:
        check_step_name(name)

    assert caught.value.kind == "step name"


@given(st.lists(st.integers(0, (1 << 48) - 1), min_size=2, max_size=20, unique=True), st.integers())
def test_new_ids_sort_by_their_time(times, seed):
    """Ids of later milliseconds are greater texts, so rows keyed by them are written in order."""
    rng = Random(seed)

    ids = [new_instance_id(now_ms, rng) for now_ms in sorted(times)]

    assert ids == sorted(ids)


def test_new_ids_are_legal_and_26_characters_long():
    """They pass the same check as a caller's own, at the ends of time too."""
    for now_ms in (0, 1_700_000_000_000, (1 << 48) - 1):
        made = new_instance_id(now_ms, Random(1))

        assert len(made) == 26
        assert check_instance_id(made) == made


def test_new_ids_of_one_millisecond_differ():
    """80 random bits keep them apart."""
    rng = Random(7)

    assert len({new_instance_id(1, rng) for _ in range(10_000)}) == 10_000
