"""The error tree: what the module's docstring draws is what the classes are."""

from __future__ import annotations

import inspect
import re

import pytest

from toque import errors
from toque.errors import InvalidName, StepFailed, ToqueError


def drawn() -> dict[str, str]:
    """Parent by child, as the lines of the docstring are indented."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in inspect.cleandoc(errors.__doc__ or "").splitlines():
        match = re.match(r"((?:│   |    )*(?:├── |└── )|(?=ToqueError$))(\w+)", line)
        if match is None:
            continue
        del path[len(match[1]) // 4:]
        if path:
            parents[match[2]] = path[-1]
        path.append(match[2])
    return parents


def classes() -> dict[str, type[BaseException]]:
    return {name: value for name, value in vars(errors).items()
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == errors.__name__}


def test_the_drawn_tree_is_the_tree_of_classes():
    """Every class is drawn under its only base of ours, and nothing else is drawn."""
    inherited = {name: [base.__name__ for base in cls.__bases__ if issubclass(base, ToqueError)]
                 for name, cls in classes().items() if cls is not ToqueError}

    assert {name: [parent] for name, parent in drawn().items()} == inherited


@pytest.mark.parametrize("name", classes())
def test_every_error_says_what_it_means(name):
    """The docstring is its own, not the parent's."""
    assert (vars(classes()[name])["__doc__"] or "").strip()


@pytest.mark.parametrize("name", classes())
def test_no_error_is_named_like_a_builtin(name):
    """`except TimeoutError` never means ours by accident."""
    import builtins

    assert not hasattr(builtins, name)


def test_errors_carry_their_data():
    """A caller can act on attributes instead of reading the message."""
    name = InvalidName("no", kind="workflow", name="a b")
    failed = StepFailed("no", step="a", error_type="ValueError", error_message="x", attempts=3)

    assert (name.kind, name.name) == ("workflow", "a b")
    assert (failed.step, failed.error_type, failed.attempts) == ("a", "ValueError", 3)
