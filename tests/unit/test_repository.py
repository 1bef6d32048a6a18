"""The repository as a whole: one list of packages, one import root, no secrets of a workplace, files of a size to read."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import toque

ROOT = Path(__file__).parents[2]
LINKED = ("workers", "storage", "chaos")
CODE_FOLDERS = ("src/toque", *LINKED, "tests", "bench", "examples", "docs/examples")
FILE_LINES_MAX = 700
STAND_IN_LENGTH_MAX = 3
TEXT_SUFFIXES = {"", ".py", ".md", ".toml", ".yaml", ".yml", ".conf", ".svg", ".txt", ".cfg", ".sh", ".typed"}
HOSTS = {  # that tracked files may name: loopback, examples, and the homes of standards
    "127.0.0.1", "localhost", "0.0.0.0", "example.org", "example.com", "www.apache.org", "www.w3.org", "keepachangelog.com",
    "semver.org", "nats", "json-schema.org",
}
PRIVATE_RANGE = re.compile(r"10(\.\d+){3}|192\.168(\.\d+){2}|172\.(1[6-9]|2\d|3[01])(\.\d+){2}|192\.0\.2\.\d+")
URL = re.compile(r"\b(?:https?|git|ssh)://(?:[^\s/@'\"`]+@)?([A-Za-z0-9][A-Za-z0-9.-]*)")
INDEX_OPTION = re.compile(r"--(?:extra-)?index-url|--find-links|--trusted-host|(?:PIP|UV|NPM)_[A-Z_]*(?:INDEX|REGISTRY)")
HOME = re.compile(r"(?<![\w.~}/-])/(?:root|home|work|mnt|opt|srv|Users)/[\w.-]+")


@cache
def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def setuptools() -> dict[str, object]:
    return project()["tool"]["setuptools"]  # type: ignore[index, no-any-return]  # a TOML file of ours


@cache
def tracked() -> tuple[Path, ...]:
    """The files of the repository, links apart; those that are new and not ignored, too."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                                capture_output=True, check=True).stdout.decode().split("\0")
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):  # an unpacked source archive
        skipped = {".venv", "build", "dist", ".git"}
        paths = [path for path in ROOT.rglob("*") if not skipped.intersection(path.relative_to(ROOT).parts)
                 and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    return tuple(path for path in paths if path.is_file() and not path.is_symlink()
                 and not any(parent.is_symlink() for parent in path.parents))


def sources() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"
            and any(path.is_relative_to(ROOT / folder) for folder in CODE_FOLDERS)]


def package_files() -> list[Path]:
    return [path for path in sources()
            if any(path.is_relative_to(ROOT / folder) for folder in ("src/toque", *LINKED))]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


# -- packages ----------------------------------------------------------------------------------------------------------

def test_the_list_of_packages_is_what_the_folders_are() -> None:
    """A folder with modules that is not in pyproject.toml would be missing in the wheel."""
    found = set()
    for path in package_files():
        inside = path.parent.relative_to(ROOT)
        parts = inside.parts[1:] if inside.parts[0] == "src" else ("toque", *inside.parts)
        found.add(".".join(parts))

    assert sorted(setuptools()["packages"]) == sorted(found)  # type: ignore[call-overload]  # a list of names


def test_every_package_has_an_init() -> None:
    """No namespace packages: what is not listed must not be importable by chance."""
    folders = {path.parent for path in package_files()}

    assert [named(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_directories_of_the_packages_are_the_real_folders() -> None:
    """The build takes the folders themselves, so the wheel does not need the links."""
    assert setuptools()["package-dir"] == {"toque": "src/toque", **{f"toque.{name}": name for name in LINKED}}


@pytest.mark.parametrize("name", LINKED)
def test_the_link_in_the_source_root_is_right(name: str) -> None:
    """Relative, so that it holds in every clone, and to the folder of the same name."""
    link = ROOT / "src" / "toque" / name

    assert link.is_symlink()
    assert os.readlink(link) == f"../../{name}"


def test_nothing_is_imported_twice() -> None:
    """Every module of the package has one file and one name, though there are links: in a process of its own."""
    program = """
import importlib, pkgutil, sys
import toque
for module in pkgutil.walk_packages(toque.__path__, "toque."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from pathlib import Path
root = Path(sys.argv[1])
names = {}
for name, module in sorted(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and Path(file).resolve().is_relative_to(root) and ".venv" not in Path(file).parts:
        names.setdefault(Path(file).resolve(), []).append(name)
for file, found in names.items():
    if len(found) > 1 or not found[0].startswith("toque"):
        print(file, found)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", program, str(ROOT)], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=50, check=False)

    assert done.stderr == ""
    assert done.stdout == ""


def test_every_module_can_be_imported_by_its_one_name() -> None:
    """The package as the tests see it holds a module for each file."""
    modules = {module.name for module in pkgutil.walk_packages(toque.__path__, "toque.")} | {"toque"}
    files = set()
    for path in package_files():
        inside = path.relative_to(ROOT).with_suffix("")
        parts = inside.parts[1:] if inside.parts[0] == "src" else ("toque", *inside.parts)
        files.add(".".join(parts).removesuffix(".__init__"))

    assert files == modules


# -- imports -----------------------------------------------------------------------------------------------------------

def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of each import, those inside functions too; relative ones have a level above 0."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def test_nothing_imports_the_bare_folders() -> None:
    """`import workers` would be a second copy, and collide with a user's own `workers`."""
    bare = [named(path) for path in sources()
            if any(level == 0 and module.split(".")[0] in LINKED for level, module in imports(path))]

    assert bare == []


def test_imports_are_absolute() -> None:
    """Also between neighbours."""
    assert [named(path) for path in sources() if any(level > 0 for level, _ in imports(path))] == []


def test_chaos_uses_what_users_can_use() -> None:
    """Faults and checkers stand outside: the public modules and their own folder, nothing that begins with `_`."""
    public = {"toque", "toque.client", "toque.sync_client", "toque.errors", "toque.workflow"}
    used = {module for path in (ROOT / "chaos").glob("*.py") for _, module in imports(path)
            if module.split(".")[0] == "toque" and not module.startswith("toque.chaos")}

    assert used
    assert used <= public


def test_every_logger_is_our_own() -> None:
    """structlog's own default prints every debug line to stdout, in users' programs too: `toque._logging` does not."""
    makers = [named(path) for path in package_files()
              if re.search(r"structlog\.(?:stdlib\.)?get_logger|logging\.getLogger", path.read_text())]

    assert makers == ["src/toque/_logging.py"]


def test_the_contracts_of_import_linter_are_there() -> None:
    """`make lint` runs them; they would be kept without a word if somebody took them out."""
    contracts = {contract["name"] for contract in project()["tool"]["importlinter"]["contracts"]}  # type: ignore[index]

    assert contracts == {"storage imports nothing of workers", "chaos uses only the public face",
                         "no cycles among neighbours"}


# -- files -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", sources(), ids=named)
def test_a_module_says_what_it_owns(path: Path) -> None:
    """It opens with a docstring."""
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip()


@pytest.mark.parametrize("path", sources(), ids=named)
def test_a_file_can_be_read_in_one_go(path: Path) -> None:
    """Not longer than FILE_LINES_MAX."""
    assert len(path.read_text().splitlines()) <= FILE_LINES_MAX


def texts() -> list[tuple[Path, str]]:
    return [(path, path.read_text()) for path in tracked() if path.suffix in TEXT_SUFFIXES and path.name != "LICENSE"]


def may_name(host: str) -> bool:
    """Whether it is on the list, of a private range, or too short to be anybody's: a stand-in of a test."""
    return (host.lower().rstrip(".") in HOSTS or PRIVATE_RANGE.fullmatch(host) is not None
            or ("." not in host and len(host) <= STAND_IN_LENGTH_MAX))


def test_no_file_names_a_host_of_a_workplace() -> None:
    """URLs lead to loopback, to examples and to standards; where packages come from is each machine's own affair."""
    found = {f"{named(path)}: {host}" for path, text in texts() for host in URL.findall(text) if not may_name(host)}

    assert found == set()


def test_no_file_sets_a_package_index() -> None:
    """No option or variable that names one; but for this test, which looks for them."""
    setting = [named(path) for path, text in texts() if path != Path(__file__) and INDEX_OPTION.search(text)]

    assert setting == []


def test_no_file_names_a_path_of_a_workplace() -> None:
    """No home directory, no folder of the machine it was written on."""
    found = {f"{named(path)}: {match}" for path, text in texts() if path != Path(__file__)
             for match in HOME.findall(text)}

    assert found == set()


def test_there_is_a_license_and_it_is_the_one_that_is_declared() -> None:
    """Apache 2.0, whole."""
    text = (ROOT / "LICENSE").read_text()

    assert project()["project"]["license"] == "Apache-2.0"  # type: ignore[index]  # a TOML file of ours
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_typed_marker_is_in_the_package() -> None:
    """Type checkers of users read our annotations."""
    assert (Path(importlib.import_module("toque").__file__ or "").parent / "py.typed").is_file()
    assert setuptools()["package-data"] == {"toque": ["py.typed"]}
