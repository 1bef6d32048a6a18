"""Finds types in user code: what a callback returns, and what a class fills in for a generic base's parameters.

Annotations may be texts (`from __future__ import annotations`, quotes); they are looked up in the module of the code,
and for a callback among the variables that it closes over.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import typing
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any, ForwardRef, NamedTuple, Never, NoReturn, TypeVar, get_args, get_origin

from toque.errors import MisuseError

CACHE_MAX = 1024

_LOOKUP_ERRORS = (NameError, AttributeError, SyntaxError, TypeError)


# -- what a callback returns -------------------------------------------------------------------------------------------

def annotated_return(fn: Callable[..., Any]) -> Any:
    """The type that a callback's result is annotated with; Any when it is not. An async one's is what it returns.

    Raises MisuseError, naming function and annotation, for an annotation that cannot be resolved.
    """
    function = _function_of(fn)
    if isinstance(function, type):
        return function
    if function is None:
        return Any
    try:
        written = function.__annotations__.get("return", Any)
    except _LOOKUP_ERRORS as error:  # where annotations are evaluated when they are asked for
        raise _unresolvable(function, "return", error) from error
    if written is None:
        return type(None)
    if written is Any or type(written) is type:
        return written
    inner = inspect.unwrap(function) if hasattr(function, "__wrapped__") else function
    if not isinstance(inner, FunctionType):
        inner = function
    known = _known.get(id(inner.__code__))
    if known is not None and known.answers(inner, written):
        return known.result
    return _looked_up(inner, written)


class _Known(NamedTuple):
    """A result type that was found before. It holds the code, so that the code's id stays its own."""

    code: CodeType
    written: Any
    names: dict[str, Any]
    result: Any

    def answers(self, function: FunctionType, written: Any) -> bool:
        """Functions made by one `def` share their code, but an evaluated annotation may differ between them."""
        if self.code is not function.__code__ or self.names is not function.__globals__:
            return False
        return self.written is written or bool(self.written == written)


_known: dict[int, _Known] = {}


def _looked_up(function: FunctionType, written: Any) -> Any:
    if not _holds_forward_reference(written):
        resolved = written
    else:
        try:
            resolved = _evaluated(written, function.__globals__, _closed_over(function))
        except _LOOKUP_ERRORS as error:
            raise _unresolvable(function, written, error) from error
    result = _result_of(resolved, function)
    if not _names_closed_over(function, written):
        if len(_known) >= CACHE_MAX:
            _known.clear()
        _known[id(function.__code__)] = _Known(function.__code__, written, function.__globals__, result)
    return result


def _names_closed_over(function: FunctionType, written: Any) -> bool:
    """Whether the annotation's text speaks of an enclosing function's variable: that differs from one to the next."""
    return any(re.search(rf"\b{name}\b", str(written)) for name in function.__code__.co_freevars)


def _closed_over(function: FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return found


def _result_of(annotation: Any, function: FunctionType) -> Any:
    """What is awaited of a sync function that returns an awaitable; NoReturn says nothing of a value."""
    if annotation is NoReturn or annotation is Never:
        return Any
    if inspect.iscoroutinefunction(function):
        return annotation
    origin = get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, Awaitable):
        arguments = get_args(annotation)
        return arguments[-1] if issubclass(origin, Coroutine) or len(arguments) == 1 else Any
    return annotation


def _function_of(fn: Any) -> FunctionType | type | None:
    """What is called in the end: a function, a class, or None for a builtin."""
    while True:
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif isinstance(fn, MethodType):
            fn = fn.__func__
        elif isinstance(fn, (FunctionType, type)):
            return fn
        else:
            call = getattr(type(fn), "__call__", None)  # noqa: B004  # its function is wanted, not whether there is one
            return call if isinstance(call, FunctionType) else None


def _unresolvable(function: FunctionType, written: Any, error: BaseException) -> MisuseError:
    return MisuseError(
        f"the return annotation {written!r:.200} of {function.__qualname__} ({function.__module__}) cannot be resolved "
        f"({error}); define or import the type at the top of the module, outside `if TYPE_CHECKING`"
    )


# -- what a class fills in ---------------------------------------------------------------------------------------------

def base_arguments(cls: type, base: type) -> tuple[Any, ...]:
    """The type arguments that `cls` gives to its generic ancestor `base`; Any where it gives none.

    Raises MisuseError for an argument in quotes that names nothing in the class's module.
    """
    return tuple(Any if isinstance(argument, TypeVar) else argument for argument in _open_arguments(cls, base))


def _open_arguments(cls: type, base: type) -> tuple[Any, ...]:
    """As `base_arguments`, with the type variables of `cls` itself left in."""
    for written in cls.__dict__.get("__orig_bases__", cls.__bases__):
        origin = get_origin(written) or written
        if not isinstance(origin, type) or not issubclass(origin, base):
            continue
        given = tuple(_resolved_argument(argument, cls) for argument in get_args(written))
        if origin is base:
            return given or _parameters(base)
        filled = dict(zip(_parameters(origin), given, strict=False))
        return tuple(_substituted(argument, filled) for argument in _open_arguments(origin, base))
    return _parameters(base)


def _parameters(cls: type) -> tuple[Any, ...]:
    return getattr(cls, "__parameters__", ())


def _substituted(argument: Any, filled: Mapping[Any, Any]) -> Any:
    if isinstance(argument, TypeVar):
        return filled.get(argument, Any)
    inner = getattr(argument, "__parameters__", ())
    if not inner or isinstance(argument, type):
        return argument
    return argument[tuple(filled.get(parameter, Any) for parameter in inner)]


def _resolved_argument(argument: Any, cls: type) -> Any:
    if not _holds_forward_reference(argument):
        return argument
    module = sys.modules.get(cls.__module__)
    try:
        return _evaluated(argument, vars(module) if module else {}, {})
    except _LOOKUP_ERRORS as error:
        text = argument.__forward_arg__ if isinstance(argument, ForwardRef) else str(argument)
        raise MisuseError(f"the type {text!r} in the bases of {cls.__qualname__} cannot be resolved ({error}); define "
                          f"or import it at the top of {cls.__module__}, outside `if TYPE_CHECKING`") from error


# -- both --------------------------------------------------------------------------------------------------------------

def _evaluated(written: Any, global_names: dict[str, Any], local_names: Mapping[str, Any]) -> Any:
    holder = SimpleNamespace(__annotations__={"it": written})
    return typing.get_type_hints(holder, global_names, dict(local_names), include_extras=True)["it"]


def _holds_forward_reference(written: Any) -> bool:
    if isinstance(written, (ForwardRef, str)):
        return True
    if get_origin(written) is typing.Literal:
        return False
    return any(_holds_forward_reference(part) for part in get_args(written))
