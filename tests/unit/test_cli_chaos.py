"""The command line of chaos, as far as it needs no server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from toque import cli
from toque.chaos import cgroups, partition
from toque.chaos.catalog import SCENARIOS
from toque.cli.chaos import EXIT_VOID


def test_the_list_names_every_scenario_and_what_it_needs(capsys):
    """Those that need nothing show a dash."""
    assert cli.main(["chaos", "list"]) == 0

    out = capsys.readouterr().out
    for scenario in SCENARIOS.values():
        assert scenario.name in out
        assert scenario.does in out
    assert "root, ip, iptables" in out


def test_an_unknown_scenario_is_wrong_usage_and_names_the_others(capsys):
    """Exit code 2."""
    assert cli.main(["chaos", "run", "earthquake"]) == 2

    assert "there is no scenario 'earthquake'; there are killing-pods, zombies" in capsys.readouterr().err


def test_a_deployment_without_a_ledger_is_wrong_usage_and_says_how_to_start_one(capsys, tmp_path):
    """The seed is told before anything is tried."""
    code = cli.main(["chaos", "run", "killing-pods", "--seed", "5", "--nats", "nats://127.0.0.1:1", "--ledger",
                     str(tmp_path), "--dir", str(tmp_path)])

    said = capsys.readouterr()
    assert code == 2
    assert said.out.splitlines()[0] == "seed 5"
    assert f"toque chaos ledger --dir {tmp_path}" in said.err


def test_partitions_without_root_are_skipped_with_the_reason(capsys, tmp_path, monkeypatch):
    """Void, and nothing is left behind."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    code = cli.main(["chaos", "run", "partitions", "--dir", str(tmp_path)])

    assert code == EXIT_VOID
    assert "partitions is skipped: partitions need root" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_missing_program_is_the_reason_too(monkeypatch, tmp_path):
    """Without iptables there is nothing to drop packets with."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert "ip and iptables, which are not installed" in partition.why_not()


@pytest.mark.parametrize("controller", ["memory", "cpu"])
def test_control_groups_that_are_not_there_are_refused(controller, monkeypatch, tmp_path):
    """A host without a controller, or one that cannot be written."""
    monkeypatch.setattr(cgroups, "ROOT", Path(tmp_path))

    with pytest.raises(cgroups.CgroupsAway):
        cgroups.Cgroup(controller)
