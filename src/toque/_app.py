"""Loads the APP of `toque dev` and `toque worker`: `module`, `module:Class`, `file.py` or `file.py:Class`.

Importing runs the user's code; whatever goes wrong there becomes an AppError that names the place.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from toque.errors import AppError, UsageError
from toque.workflow import Workflow, is_runnable, params_type, result_type, workflow_name

Lifespan = Callable[[], AbstractAsyncContextManager[Any]]

NAMES_SHOWN_MAX = 20
FILES_MAX = 2_000
_LIBRARIES = frozenset(Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib"))
_NOT_WATCHED = frozenset({"site-packages", "dist-packages", "node_modules", ".venv", "venv", ".toque"})


@dataclass(frozen=True, slots=True)
class App:
    """What a pod serves."""

    workflows: dict[str, type[Workflow[Any, Any]]]
    """By workflow name; at least one."""
    lifespan: Lifespan | None
    """Makes the context manager that is entered once per pod; what it yields is `self.env`."""
    reference: str
    """The APP as it was given."""
    files: list[Path] = field(default_factory=list)
    """Source files of the app's own modules: those to watch for changes."""


class _Reference(NamedTuple):
    """An APP taken apart: one of `module` and `file` is set; `attribute` may be empty."""

    module: str
    file: Path | None
    attribute: str


def load_app(reference: str) -> App:
    """Import the APP and find its workflows. Puts the working directory on sys.path, as `python -m` does.

    Raises AppError: nothing of that name, an import that raises, no such class, not a workflow, none or two of one
    name, a lifespan that is no async context manager.
    """
    parsed = _parse(reference)
    _put_on_path(Path.cwd())
    module = _import_file(parsed.file) if parsed.file else _import_module(parsed.module)
    classes = [_named_class(module, parsed.attribute)] if parsed.attribute else _defined_in(module)
    if not classes:
        raise AppError(_nothing_found(reference, module))
    roots = [Path.cwd()] + ([parsed.file.parent] if parsed.file else [])
    return App(_by_name(classes), _lifespan(module, classes), reference, _own_files(module, roots))


# -- the reference -----------------------------------------------------------------------------------------------------

def _parse(reference: str) -> _Reference:
    target, colon, attribute = reference.rpartition(":")
    if not colon:
        target, attribute = reference, ""
    attribute_is_name = all(part.isidentifier() for part in attribute.split("."))
    if not target or (colon and not attribute_is_name):
        raise AppError(f"APP {reference!r} is not of the form module, module:Class, file.py or file.py:Class")
    if target.endswith(".py") or os.sep in target:
        return _Reference("", _existing_file(target), attribute)
    if not all(part.isidentifier() for part in target.split(".")):
        raise AppError(f"APP {reference!r}: {target!r} is neither a module's name nor a path to a .py file")
    return _Reference(target, None, attribute)


def _existing_file(target: str) -> Path:
    file = Path(target).expanduser()
    if file.is_dir():
        raise AppError(f"{target} is a folder; name a .py file in it, or a module")
    if not file.is_file():
        raise AppError(f"no file {target} (looked for {file.absolute()}, in the working directory {Path.cwd()})")
    return file.resolve()


# -- importing ---------------------------------------------------------------------------------------------------------

def _import_module(name: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name or (error.name and name.startswith(error.name + ".")):
            raise AppError(_no_module(name, error)) from error
        raise AppError(_import_raised(name, error)) from error
    except (Exception, SystemExit) as error:  # the user's module is run here
        raise AppError(_import_raised(name, error)) from error


def _import_file(file: Path) -> ModuleType:
    """Under the name that the user's own imports would give it, so that it is not imported twice."""
    root, name = _module_of(file)
    _put_on_path(root)
    if name not in sys.stdlib_module_names and _would_import(name) == file:
        return _import_module(name)
    return _execute(file, f"toque_app_{file.stem}")


def _module_of(file: Path) -> tuple[Path, str]:
    """The folder that has to be on sys.path, and the dotted name below it."""
    parts = [] if file.name == "__init__.py" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts)


def _would_import(name: str) -> Path | None:
    """The file that `import name` loads, or has loaded."""
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    except (Exception, SystemExit) as error:  # a parent package of the user's is run here
        raise AppError(_import_raised(name.rpartition(".")[0], error)) from error
    return Path(spec.origin).resolve() if spec and spec.origin else None


def _execute(file: Path, name: str) -> ModuleType:
    """Import a file whose own name is taken by another module, or is no name."""
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise AppError(f"{file} cannot be imported as Python source")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's file is run here
        del sys.modules[name]
        raise AppError(_import_raised(str(file), error)) from error
    return module


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _no_module(name: str, error: ModuleNotFoundError) -> str:
    looked_for = name.replace(".", os.sep)
    missing = f" ({error})" if error.name != name or "not a package" in str(error) else ""
    return (f"no module {name!r}{missing}: looked for {looked_for}.py and {looked_for}{os.sep}__init__.py in the "
            f"working directory {Path.cwd()} and on sys.path; a file is named by its path, for example "
            f"{looked_for}.py")


def _import_raised(name: str, error: BaseException) -> str:
    message = f": {error}" if str(error) else ""
    return f"importing {name} raised {type(error).__name__}{message:.2000}{_place(error)}"


def _place(error: BaseException) -> str:
    """The user's line: the last frame that is neither ours nor the import system's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"\n  {error.filename}:{error.lineno}: {(error.text or '').strip()}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if not _is_toque(Path(frame.filename)) and "importlib" not in frame.filename]
    if not frames:
        return ""
    own = [frame for frame in frames if not _is_installed(Path(frame.filename))]
    last = (own or frames)[-1]
    return f"\n  {last.filename}:{last.lineno}: {last.line or ''}"


# -- what the module holds ---------------------------------------------------------------------------------------------

def _is_workflow(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Workflow) and value is not Workflow


def _defined_in(module: ModuleType) -> list[type[Workflow[Any, Any]]]:
    """Workflows of the module itself; of a package, those of its modules that it imports, too."""
    inside = f"{module.__name__}." if hasattr(module, "__path__") else None
    found: dict[int, type[Workflow[Any, Any]]] = {}
    for value in vars(module).values():
        if not _is_workflow(value) or not is_runnable(value):
            continue
        is_own = value.__module__ == module.__name__
        is_below = inside is not None and value.__module__.startswith(inside)
        if is_own or is_below:
            found[id(value)] = value
    return list(found.values())


def _named_class(module: ModuleType, attribute: str) -> type[Workflow[Any, Any]]:
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise AppError(f"{_shown(module)} has no {attribute!r}; {_holds(module)}")
        value = getattr(value, part)
    if not _is_workflow(value):
        kind = "the class" if isinstance(value, type) else f"a {type(value).__name__}"
        raise AppError(f"{attribute!r} in {_shown(module)} is {kind}, not a subclass of toque.Workflow; "
                       f"{_holds(module)}")
    if not is_runnable(value):
        raise AppError(f"{attribute!r} in {_shown(module)} has no `async def run(self, event, step)`")
    cls: type[Workflow[Any, Any]] = value
    return cls


def _by_name(classes: Iterable[type[Workflow[Any, Any]]]) -> dict[str, type[Workflow[Any, Any]]]:
    found: dict[str, type[Workflow[Any, Any]]] = {}
    for cls in classes:
        name = workflow_name(cls)
        if name in found:
            raise AppError(f"two workflows are named {name!r}: {_class_name(found[name])} and {_class_name(cls)}; give "
                           "one another name=, or name one class in APP")
        _check_class(cls)
        found[name] = cls
    return found


def _check_class(cls: type[Workflow[Any, Any]]) -> None:
    """What would otherwise show only when the first instance runs."""
    try:
        params_type(cls)
        result_type(cls)
    except UsageError as error:
        raise AppError(str(error)) from error
    required = [p.name for p in inspect.signature(cls).parameters.values()
                if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if required:
        raise AppError(f"{_class_name(cls)} cannot be made without arguments ({', '.join(required)}); share objects "
                       "through the app's lifespan and self.env")


def _lifespan(module: ModuleType, classes: list[type[Workflow[Any, Any]]]) -> Lifespan | None:
    """The module's `lifespan`, or that of the module where a class named alone was defined."""
    homes = [module] + [sys.modules[cls.__module__] for cls in classes[:1] if cls.__module__ in sys.modules]
    for home in homes:
        lifespan = getattr(home, "lifespan", None)
        if lifespan is None:
            continue
        if inspect.isasyncgenfunction(lifespan) or inspect.iscoroutinefunction(lifespan) or not callable(lifespan):
            raise AppError(f"lifespan in {_shown(home)} must be a function that makes an async context manager: put "
                           "@contextlib.asynccontextmanager on `async def lifespan()`")
        found: Lifespan = lifespan
        return found
    return None


def _nothing_found(reference: str, module: ModuleType) -> str:
    imported = sorted({_class_name(value) for value in vars(module).values() if _is_workflow(value)})
    also = f" (it only imports, or has no run for, {', '.join(imported[:NAMES_SHOWN_MAX])})" if imported else ""
    return (f"no workflow found in {reference}: {_shown(module)} defines no subclass of toque.Workflow with "
            f"`async def run(self, event, step)`{also}")


def _holds(module: ModuleType) -> str:
    """The names that the user may have meant: workflows, or else any class."""
    values = vars(module).items()
    workflows = sorted(name for name, value in values if _is_workflow(value))
    if workflows:
        return "workflows there: " + ", ".join(workflows[:NAMES_SHOWN_MAX])
    classes = sorted(name for name, value in values if isinstance(value, type) and value.__module__ == module.__name__)
    return "no workflow is there" + (f", only {', '.join(classes[:NAMES_SHOWN_MAX])}" if classes else "")


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _shown(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__


# -- files to watch ----------------------------------------------------------------------------------------------------

def _own_files(module: ModuleType, roots: list[Path]) -> list[Path]:
    """Source files of loaded modules under the roots, without installed packages and Toque's own."""
    found = {_source(module)}
    for loaded in list(sys.modules.values()):
        file = _source(loaded)
        if file is not None and _is_own(file, roots):
            found.add(file)
    return sorted(file for file in found if file is not None)[:FILES_MAX]


def _source(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if isinstance(file, str) and file.endswith(".py") else None


def _is_own(file: Path, roots: list[Path]) -> bool:
    below_root = any(file.is_relative_to(root.resolve()) for root in roots)
    return below_root and not _is_toque(file) and not _is_installed(file)


def _is_toque(file: Path) -> bool:
    return file.resolve().is_relative_to(Path(__file__).resolve().parent)


def _is_installed(file: Path) -> bool:
    """Part of the standard library or of an environment, which may lie inside the project."""
    return bool(_NOT_WATCHED.intersection(file.parts)) or any(file.is_relative_to(lib) for lib in _LIBRARIES)
