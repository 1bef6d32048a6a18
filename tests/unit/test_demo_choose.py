"""The choice of files is a deterministic spread, worth the time that is wanted."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from toque.demo import choose as module
from toque.demo.choose import FILES_MIN, choose, python_roots, source_files
from toque.demo.measure import FILE_BYTES_MAX


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A hundred files of 5 KB in ten folders."""
    for number in range(100):
        folder = tmp_path / f"package_{number % 10}"
        folder.mkdir(exist_ok=True)
        (folder / f"module_{number}.py").write_text("#" * 4_999 + "\n")
    return tmp_path


def clock_of(s_per_call: float) -> object:
    """A clock that has gone on by so much at each look."""
    return (call * s_per_call for call in count()).__next__


def choice_of(root: Path, *, seconds: float, s_per_call: float = 0.1) -> module.Choice:
    return choose(seconds=seconds, cores=1.0, roots=[root], clock=clock_of(s_per_call))  # type: ignore[arg-type]


def test_files_are_taken_until_the_work_lasts_long_enough(root: Path) -> None:
    """Twice the time takes twice the files; the expectation is what was asked for."""
    once, twice = choice_of(root, seconds=3.0), choice_of(root, seconds=6.0)

    assert len(once.files) > FILES_MIN
    assert len(twice.files) == pytest.approx(2 * len(once.files), abs=2)
    assert once.expected_s == pytest.approx(3.0, rel=0.1)


def test_the_same_files_are_chosen_again(root: Path) -> None:
    """Which files come first depends on nothing but their paths, and more time adds to them."""
    short, again, longer = (choice_of(root, seconds=seconds) for seconds in (3.0, 3.0, 5.0))

    assert short.files == again.files
    assert short.files == longer.files[:len(short.files)]


def test_the_choice_is_spread_over_the_folders(root: Path) -> None:
    """A quarter of the files comes from nearly every folder."""
    choice = choice_of(root, seconds=3.0)

    assert len({Path(file.path).parent for file in choice.files}) >= 8


def test_a_small_machine_is_searched_to_the_end(root: Path) -> None:
    """When all there is does not last long enough, all there is is taken."""
    choice = choice_of(root, seconds=1e6)

    assert (len(choice.files), choice.found) == (100, 100)
    assert choice.expected_s < 1e6


def test_a_slow_machine_still_gets_a_few_files(root: Path) -> None:
    """However short the time, there is something to see."""
    assert len(choice_of(root, seconds=0.001).files) == FILES_MIN


def test_big_files_are_left_out_and_named(root: Path) -> None:
    """A file beyond the limit is not taken, and told of."""
    big = root / "big.py"
    big.write_bytes(b"#" * (FILE_BYTES_MAX + 1))

    choice = choice_of(root, seconds=1e6)

    assert [file.path for file in choice.too_big] == [str(big)]
    assert len(choice.files) == 100


def test_links_and_caches_are_not_counted_twice(root: Path) -> None:
    """A file reached by two names is one file; caches, foreign files and broken links are none."""
    (root / "link.py").symlink_to(root / "package_0" / "module_0.py")
    (root / "broken.py").symlink_to(root / "nowhere.py")
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "cached.py").touch()
    (root / "notes.txt").touch()

    assert len(list(source_files([root, root / "package_0"]))) == 100


def test_the_standard_library_is_found() -> None:
    """The machine's own Python source is among the roots."""
    assert any((root / "ast.py").is_file() for root in python_roots())
