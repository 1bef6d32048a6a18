"""Types found in user code: return annotations in every form, and the arguments of generic bases."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import pytest

from toque import _annotations
from toque._annotations import annotated_return, base_arguments
from toque.errors import MisuseError

A = TypeVar("A")
B = TypeVar("B")


@dataclass
class Found:
    x: int


def as_text() -> list[Found]: ...
async def async_text() -> Found: ...
def awaitable() -> Awaitable[Found]: ...
def coroutine() -> Coroutine[Any, Any, Found]: ...
def future() -> asyncio.Future[Found]: ...
def nothing() -> None: ...
def never() -> NoReturn: ...
def anything() -> Any: ...
def unannotated(): ...
def unresolvable_elsewhere(x: NoSuchType) -> Found: ...  # noqa: F821  # only the return annotation counts


class Callable_:
    def __call__(self) -> Found: ...

    def method(self) -> Found: ...

    @classmethod
    def of_class(cls) -> Found: ...

    @staticmethod
    def static() -> Found: ...


def run_source(source: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run text as a module of its own, whose annotations are evaluated unless it says otherwise."""
    exec(compile(source, "<module>", "exec", dont_inherit=True), names)
    return names


def wrapping(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args)
    return wrapper


@pytest.mark.parametrize(("fn", "type_"), [
    (as_text, list[Found]), (async_text, Found), (awaitable, Found), (coroutine, Found), (future, Found),
    (nothing, type(None)), (never, Any), (anything, Any), (unannotated, Any), (unresolvable_elsewhere, Found),
    (lambda: 1, Any), (len, Any), (Found, Found), (Callable_(), Found), (Callable_().method, Found),
    (Callable_.of_class, Found), (Callable_.static, Found), (functools.partial(as_text), list[Found]),
    (functools.partial(functools.partial(Callable_().method)), Found), (wrapping(as_text), list[Found]),
    (wrapping(async_text), Found), (functools.partial(len), Any),
])
def test_every_form_of_callable_has_its_return_type(fn, type_):
    """Texts are resolved, wrappers looked through, awaitables unwrapped; asking twice gives the same."""
    assert annotated_return(fn) == type_
    assert annotated_return(fn) == type_


def test_an_unresolvable_annotation_is_named_with_its_function():
    """The message says what to do about it."""
    def callback() -> list[NoSuchType]: ...  # noqa: F821

    with pytest.raises(MisuseError, match=r"'list\[NoSuchType\]' of .*callback .*outside `if TYPE_CHECKING`"):
        annotated_return(callback)


def test_an_annotation_that_is_no_expression_is_named():
    """A text that does not parse is the user's mistake too."""
    def callback(): ...
    callback.__annotations__["return"] = "not a type"

    with pytest.raises(MisuseError, match=r"'not a type' of .*callback"):
        annotated_return(callback)


def test_a_type_of_an_enclosing_function_is_found():
    """What the callback closes over can be named in its annotation, and differs from one definition to the next."""
    def make(Local):
        def callback() -> list[Local]:
            return [Local(1)]
        return callback

    assert annotated_return(make(Found)) == list[Found]
    assert annotated_return(make(int)) == list[int]


def test_evaluated_annotations_of_one_def_are_told_apart():
    """Functions made by one `def` share their code, not their annotation."""
    names = run_source("def make(T):\n    def callback() -> T: ...\n    return callback\n", {})

    assert [annotated_return(names["make"](type_)) for type_ in (int, list[str], int)] == [int, list[str], int]


def test_equal_code_of_two_modules_is_told_apart():
    """The same text means another type in another module."""
    source = "from __future__ import annotations\ndef callback() -> T: ...\n"
    first = run_source(source, {"T": int})
    second = run_source(source, {"T": str})

    assert (annotated_return(first["callback"]), annotated_return(second["callback"])) == (int, str)


def test_a_partly_quoted_annotation_is_resolved():
    """Quotes inside an evaluated annotation are looked up like a whole text."""
    names = run_source("def callback() -> list['Found']: ...\n", {"Found": Found})

    assert annotated_return(names["callback"]) == list[Found]


def test_remembered_types_are_bounded(monkeypatch):
    """A program that makes functions keeps a bounded number of answers."""
    monkeypatch.setattr(_annotations, "CACHE_MAX", 3)
    monkeypatch.setattr(_annotations, "_known", known := {})

    for number in range(10):
        names = run_source(f"def f{number}() -> list[int]: ...\n", {})
        assert annotated_return(names[f"f{number}"]) == list[int]

    assert len(known) <= 3


class Base(Generic[A, B]):
    pass


class Bare(Base): ...
class Direct(Base[int, list[str]]): ...
class Inherited(Direct): ...
class Half(Base[A, str]): ...
class Filled(Half[Found]): ...
class Swapped(Base[B, A], Generic[A, B]): ...
class SwappedFilled(Swapped[int, str]): ...
class Nested(Base[list[A], dict[str, A]]): ...
class NestedFilled(Nested[int]): ...
class HalfBare(Half): ...
class Mixin: ...
class Mixed(Mixin, Direct): ...
class Quoted(Base["Found", "list[Found]"]): ...
class PartlyQuoted(Base[list["Found"], None]): ...
class Wrong(Base["NoSuchType", int]): ...


@pytest.mark.parametrize(("cls", "arguments"), [
    (Bare, (Any, Any)), (Direct, (int, list[str])), (Inherited, (int, list[str])), (Filled, (Found, str)),
    (SwappedFilled, (str, int)), (NestedFilled, (list[int], dict[str, int])), (HalfBare, (Any, str)),
    (Mixed, (int, list[str])), (Quoted, (Found, list[Found])), (PartlyQuoted, (list[Found], type(None))),
])
def test_arguments_of_a_generic_base_are_found(cls, arguments):
    """Also through generic classes in between, and quoted; Any where nothing is said."""
    assert base_arguments(cls, Base) in (arguments, tuple(None if a is type(None) else a for a in arguments))


def test_a_quoted_argument_that_names_nothing_is_told():
    """The message has the class, the text and what to do."""
    with pytest.raises(MisuseError, match=r"the type 'NoSuchType' in the bases of Wrong .*outside `if TYPE_CHECKING`"):
        base_arguments(Wrong, Base)
