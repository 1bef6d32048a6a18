"""The names that users import: exactly those listed, all documented, and none of them needed inside."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import toque
from toque import errors

PACKAGE = Path(toque.__file__).parent


def public_methods(cls: type) -> list[str]:
    return [f"{cls.__name__}.{name}" for name, value in vars(cls).items()
            if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, (classmethod, property)))]


def test_all_lists_what_is_there():
    """`__all__` has every public name of the package that is not a module, once."""
    there = {name for name, value in vars(toque).items() if not name.startswith("_") and not inspect.ismodule(value)}

    assert sorted(toque.__all__) == sorted(there - {"annotations"})


def test_every_error_is_exported():
    """Whatever can be raised can be caught by a public name."""
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)
              and issubclass(value, errors.ToqueError)}

    assert raised <= set(toque.__all__)


@pytest.mark.parametrize("name", toque.__all__)
def test_every_exported_name_is_documented(name):
    """It has a docstring of its own, not its parent's."""
    assert (vars(getattr(toque, name)).get("__doc__") or "").strip()


@pytest.mark.parametrize("name", toque.__all__)
def test_every_public_method_of_an_exported_class_is_documented(name):
    """Methods and properties say what they do, and what can go wrong."""
    cls = getattr(toque, name)

    undocumented = [method for method in public_methods(cls)
                    if not (getattr(vars(cls)[method.partition(".")[2]], "__doc__", None) or "").strip()]

    assert undocumented == []


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").is_file() or (PACKAGE / name).is_dir()


def taken_from_root(file: Path) -> set[str]:
    """Names, other than modules, that a file imports from the root."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "toque":
            found.update(alias.name for alias in node.names if not is_module(alias.name))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name == "toque")
    return found


@pytest.mark.parametrize("folder", ["", "workers", "storage"])
def test_nothing_inside_imports_the_root(folder):
    """The root is for users; inside it would be a cycle."""
    files = sorted((PACKAGE / folder).glob("*.py"))
    importing = {file.name: taken for file in files if (taken := taken_from_root(file))}

    assert files
    assert importing == {}
