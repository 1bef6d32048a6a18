"""The directory of a `toque dev`: who may use it, and what may be wiped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from toque._dev_state import DevState, check_ours, claim_directory, wipe, write_state
from toque.errors import SetupError


def test_a_claim_makes_the_directory_and_marks_it(tmp_path: Path) -> None:
    """A missing directory is made, and known again as one of ours."""
    claim = claim_directory(tmp_path / "new" / "dir", "main")

    claim.release()

    check_ours(tmp_path / "new" / "dir")
    assert claim_directory(tmp_path / "new" / "dir", "main").identity.account == "main"


def test_two_cannot_have_one_directory(tmp_path: Path) -> None:
    """The second `toque dev` is told the process id of the first; afterwards the directory is free."""
    claim = claim_directory(tmp_path, "main")

    with pytest.raises(SetupError, match=f"process {os.getpid()}.* runs in .* already"):
        claim_directory(tmp_path, "main")

    claim.release()
    claim_directory(tmp_path, "main").release()


def test_the_ports_of_the_last_time_are_kept(tmp_path: Path) -> None:
    """A restart can have the same addresses."""
    claim = claim_directory(tmp_path, "main")
    claim.remember_ports(20_001, 20_002)
    claim.release()

    identity = claim_directory(tmp_path, "main").identity

    assert (identity.port, identity.monitor_port) == (20_001, 20_002)


def test_a_directory_of_another_account_is_refused(tmp_path: Path) -> None:
    """The error names both accounts, and the directory stays free for its own."""
    claim_directory(tmp_path, "main").release()

    with pytest.raises(SetupError, match="belongs to the account 'main', not 'shop'"):
        claim_directory(tmp_path, "shop")

    claim_directory(tmp_path, "main").release()


def test_a_directory_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    """What a newer version wrote is neither read nor changed."""
    text = json.dumps({"format": 2, "something": "new"})
    (tmp_path / "directory.json").write_text(text)

    with pytest.raises(SetupError, match="has format 2; this version of Toque knows formats up to 1"):
        claim_directory(tmp_path, "main")

    assert (tmp_path / "directory.json").read_text() == text


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """A directory that holds other things is neither used nor wiped."""
    (tmp_path / "thesis.txt").write_text("years of work")

    for act in (lambda: claim_directory(tmp_path, "main"), lambda: wipe(tmp_path)):
        with pytest.raises(SetupError, match=r"holds 'thesis.txt' and was not made by `toque dev`"):
            act()

    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_wipe_leaves_nothing_of_the_last_time(tmp_path: Path) -> None:
    """After --clean another account may have the directory; what links point at is not followed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    ours = tmp_path / "ours"
    claim_directory(ours, "main").release()
    (ours / "nats").mkdir()
    (ours / "nats" / "data").touch()
    (ours / "link").symlink_to(outside)

    wipe(ours)

    assert [entry.name for entry in ours.iterdir()] == ["dev.lock"]
    assert (outside / "kept").exists()
    claim_directory(ours, "shop").release()


def test_a_wipe_spares_a_living_cluster(tmp_path: Path) -> None:
    """--clean never pulls the floor from under another `toque dev`."""
    claim = claim_directory(tmp_path, "main")

    with pytest.raises(SetupError, match="runs in"):
        wipe(tmp_path)

    assert (tmp_path / "directory.json").exists()
    claim.release()


def test_the_state_file_goes_with_the_claim(tmp_path: Path) -> None:
    """dev.json is there only while a `toque dev` lives, and says what clients look for."""
    claim = claim_directory(tmp_path, "main")
    state = DevState(url="nats://127.0.0.1:1", monitor_url="http://127.0.0.1:2", pid=os.getpid(), app="a.py",
                     account="main", pods={"pod-1": 17})

    write_state(tmp_path, state)
    written = json.loads((tmp_path / "dev.json").read_text())
    claim.release()

    assert (written["url"], written["pid"], written["pods"]) == ("nats://127.0.0.1:1", os.getpid(), {"pod-1": 17})
    assert not (tmp_path / "dev.json").exists()
