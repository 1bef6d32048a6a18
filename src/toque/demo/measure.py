"""The census's real work on one Python file: plain functions that know nothing of Toque.

A file that Python itself cannot read is a result too: the reason stands in `error`, and the rest is what could be told.
"""

from __future__ import annotations

import ast
import hashlib
import io
import symtable
import sys
import threading
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

FILE_BYTES_MAX = 300_000  # keeps a callback below about a second
COMPLEXITY_BINS = (1, 2, 3, 5, 8, 13, 21, 34)  # lower bounds

_TOO_DEEP = (RecursionError, MemoryError)  # what the compiler raises for source that is nested too deep
_UNREADABLE = (SyntaxError, ValueError, tokenize.TokenError, *_TOO_DEEP)
_LAYOUT = frozenset({tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
                     tokenize.ENDMARKER, tokenize.COMMENT})
_parsing = threading.Lock()  # before 3.13, threads that make syntax trees disturb each other (CPython gh-106905)
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case, ast.comprehension)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Digest(msgspec.Struct, frozen=True):
    """What the file is."""

    size: int
    sha256: str


class Measures(msgspec.Struct, frozen=True):
    """What the file holds: lines by kind, definitions, cyclomatic complexity."""

    lines: int = 0
    code_lines: int = 0
    comment_lines: int = 0
    functions: int = 0
    classes: int = 0
    complexity: int = 0  # of all functions together
    bins: tuple[int, ...] = ()  # functions per bin of COMPLEXITY_BINS
    hardest: str = ""  # the most complex function
    hardest_complexity: int = 0
    error: str = ""


class Symbols(msgspec.Struct, frozen=True):
    """What the file names: from the compiler's own symbol table, and its imports by top-level module."""

    scopes: int = 0
    names: int = 0
    free_names: int = 0  # taken from an enclosing function
    imports: tuple[str, ...] = ()
    relative_imports: int = 0
    error: str = ""


class Resolution(msgspec.Struct, frozen=True):
    """Where the imported modules come from."""

    stdlib: tuple[str, ...] = ()
    installed: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()  # that the installed ones belong to
    missing: tuple[str, ...] = ()


class FileReport(msgspec.Struct, frozen=True):
    """The census's result for one file."""

    path: str
    digest: Digest
    measures: Measures
    symbols: Symbols
    resolution: Resolution


def hash_file(path: str) -> Digest:
    """The file's size and SHA-256."""
    data = Path(path).read_bytes()
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def measure_file(path: str) -> Measures:
    """Tokenize the file and walk its syntax tree."""
    source = Path(path).read_bytes()
    lines = source.count(b"\n") + (not source.endswith(b"\n") and bool(source))
    try:
        code_lines, comment_lines = _line_kinds(source)
        functions, classes = _definitions(_tree(source, path))
    except _UNREADABLE as exc:
        return Measures(lines, error=_reason(exc))
    hardest, hardest_complexity = max(functions, key=lambda item: item[1], default=("", 0))
    complexities = [complexity for _, complexity in functions]
    return Measures(lines, code_lines, comment_lines, len(functions), classes, sum(complexities), bins_of(complexities),
                    hardest, hardest_complexity)


def symbols_of(path: str) -> Symbols:
    """Let the compiler make the file's symbol table, and list its imports."""
    source = Path(path).read_bytes()
    try:
        table = symtable.symtable(source, path, "exec")  # type: ignore[arg-type]  # takes bytes, as compile() does
        imports, relative = _imports(_tree(source, path))
    except _UNREADABLE as exc:
        return Symbols(error=_reason(exc))
    scopes = list(_scopes(table))
    names = sum(len(scope.get_identifiers()) for scope in scopes)
    free = sum(len(scope.get_frees()) for scope in scopes if isinstance(scope, symtable.Function))
    return Symbols(len(scopes), names, free, tuple(sorted(imports)), relative)


def resolve_imports(imports: Iterable[str], distributions: Mapping[str, list[str]]) -> Resolution:
    """Say of each top-level module whether it is Python's own, installed (and from what), or missing here."""
    stdlib, installed, owners, missing = [], [], set(), []
    for name in imports:
        if name in sys.stdlib_module_names:
            stdlib.append(name)
        elif name in distributions:
            installed.append(name)
            owners.update(distributions[name])
        else:
            missing.append(name)
    return Resolution(tuple(stdlib), tuple(installed), tuple(sorted(owners)), tuple(missing))


def report_on(path: str, distributions: Mapping[str, list[str]]) -> FileReport:
    """All four steps at once: what the census must have found."""
    symbols = symbols_of(path)
    resolution = resolve_imports(symbols.imports, distributions)
    return FileReport(path, hash_file(path), measure_file(path), symbols, resolution)


def bins_of(complexities: Iterable[int]) -> tuple[int, ...]:
    """How many fall into each bin of COMPLEXITY_BINS."""
    counts = [0] * len(COMPLEXITY_BINS)
    for complexity in complexities:
        counts[sum(complexity >= low for low in COMPLEXITY_BINS) - 1] += 1
    return tuple(counts)


def _tree(source: bytes, path: str) -> ast.Module:
    with _parsing:
        return ast.parse(source, path)


def _line_kinds(source: bytes) -> tuple[int, int]:
    """(lines with code, lines with a comment)."""
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in _LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code), len(comments)


def _definitions(tree: ast.Module) -> tuple[list[tuple[str, int]], int]:
    """(name and complexity of every function, number of classes)."""
    functions: list[tuple[str, int]] = []
    classes = 0
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS):
            functions.append((node.name, _complexity(node)))
        classes += isinstance(node, ast.ClassDef)
    return functions, classes


def _complexity(function: ast.AST) -> int:
    """McCabe's number: one, and one for each branch; functions inside count for themselves."""
    complexity = 1
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, _FUNCTIONS):
            continue
        complexity += isinstance(node, _BRANCHES)
        if isinstance(node, ast.BoolOp):
            complexity += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            complexity += len(node.ifs)
        waiting.extend(ast.iter_child_nodes(node))
    return complexity


def _imports(tree: ast.Module) -> tuple[set[str], int]:
    """(top-level modules imported, number of relative imports)."""
    modules: set[str] = set()
    relative = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            relative += 1
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.partition(".")[0])
    return modules, relative


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    waiting = [table]
    while waiting:
        scope = waiting.pop()
        yield scope
        waiting.extend(scope.get_children())


def _reason(exc: Exception) -> str:
    if isinstance(exc, _TOO_DEEP):
        return "nested too deep for the compiler"
    return f"{type(exc).__name__}: {str(exc).partition(chr(10))[0]}"[:200]
