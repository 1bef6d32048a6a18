"""The wheel, built from a copy of the source, is all that a machine needs.

The short form runs it from where it was unpacked, beside this environment's packages; with TOQUE_FULL=1 it is installed
with its extras into a clean environment, by the pip and from the index that are set up here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

SOURCE = Path(__file__).resolve().parents[2]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "src", "workers", "storage", "chaos")
PACKAGES = {"toque", "toque/cli", "toque/sim", "toque/demo", "toque/workers", "toque/storage", "toque/chaos"}
MODULES_OUTSIDE = ("workers", "storage", "chaos")  # a user's own packages: ours must not be importable by these names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the source, so that nothing of a build stays in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        source = SOURCE / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(out), str(copy), cwd=copy)
    [built] = out.glob("*.whl")
    return built


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """What it prints; it must end well. Only `path` is on PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_runs_from_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    """It holds every package and the mark of typed code, and the commands start from it alone."""
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
        names = archive.namelist()

    version = run(sys.executable, "-P", "-m", "toque", "version", cwd=tmp_path, path=unpacked)
    demo = run(sys.executable, "-P", "-m", "toque", "demo", "--help", cwd=tmp_path, path=unpacked)

    holding = {str(Path(name).parent) for name in names if name.endswith(".py")}
    assert holding == PACKAGES and "toque/py.typed" in names
    assert "nats-server 2." in version and "Watch real work survive a killed pod" in demo


@pytest.mark.slow
def test_the_wheel_installs_into_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """With the extras `cli` and `server`: `toque version` finds the server, `toque demo` is there."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    bin_ = environment / "bin"
    run(str(bin_ / "python"), "-m", "pip", "install", "-q", f"{wheel}[cli,server]", cwd=tmp_path)

    version = run(str(bin_ / "toque"), "version", cwd=tmp_path)
    demo = run(str(bin_ / "toque"), "demo", "--help", cwd=tmp_path)
    outside = run(str(bin_ / "python"), "-c", "import importlib.util as u; print([u.find_spec(name) for name in "
                  f"{MODULES_OUTSIDE}])", cwd=tmp_path)

    assert f"({bin_}" in version and "toque 0." in version
    assert "Watch real work survive a killed pod" in demo
    assert outside.strip() == str([None] * len(MODULES_OUTSIDE))
