"""The `toque` command as a whole: help, usage errors, and what works without the `cli` extra."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from toque import cli
from toque._reports import StationReport
from toque.client import Client
from toque.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
COMMANDS = ["dev", "worker", "demo", "version", "trigger", "queues", "stations", "stations describe", "pods", "workflows",
            "instances list", "instances count", "instances describe", "instances watch",
            "instances pause", "instances resume", "instances restart", "instances terminate", "instances delete",
            "dead list", "dead show", "dead retry", "dead drop",
            "accounts create", "accounts list", "accounts describe", "accounts set"]
WITHOUT_EXTRA = ("import sys, importlib.util as u; find = u.find_spec\n"
                 "u.find_spec = lambda name, *a: None if name in ('typer', 'rich') else find(name, *a)\n"
                 "sys.modules['typer'] = sys.modules['rich'] = None\n"
                 "from toque.cli import main; sys.exit(main(sys.argv[1:]))")


def run(*arguments: str, python: tuple[str, ...] = ("-m", "toque"), cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *python, *arguments], env=ENV, cwd=cwd, capture_output=True, text=True,
                          timeout=30, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help works for each command, and names its options."""
    try:
        code = cli.main([*command.split(), "--help"])
    except SystemExit as end:  # of argparse, for `worker`
        code = int(end.code or 0)

    shown = capsys.readouterr().out
    assert code == 0 and command.split()[-1] in shown and "--" in shown


@pytest.mark.parametrize("command", ["create", "list", "describe", "set"])
def test_accounts_are_named_in_one_way(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An --account beside the NAME would have no effect, and look as if it had."""
    cli.main(["accounts", command, "--help"])

    shown = capsys.readouterr().out
    assert "--nats" in shown and "--account" not in shown


@pytest.mark.parametrize("arguments", [
    ["--account", "no.such", "-o", "json", "describe", "1.0"], ["-o", "json", "describe", "1.0", "--account", "no.such"],
    ["--account", "main", "describe", "--account", "no.such", "1.0"]])
def test_options_of_a_group_are_those_of_its_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they stand; the nearer one counts."""
    seen: list[str] = []

    def connect(url: str | None, **options: Any) -> None:
        seen.append(options["account"])
        raise SetupError("seen")

    monkeypatch.setattr(Client, "connect", connect)

    assert cli.main(["stations", *arguments]) != 0
    assert seen == ["no.such"]


def test_the_output_of_a_group_is_that_of_its_command(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    """`-o json` before the command prints JSON."""

    class Connected:
        async def __aenter__(self) -> Connected:
            return self

        async def __aexit__(self, *error: object) -> None:
            pass

        async def stations(self) -> list[StationReport]:
            return [StationReport("1.0", None, "nobody")]

    monkeypatch.setattr(Client, "connect", lambda *_, **__: Connected())

    assert cli.main(["stations", "-o", "json", "describe", "1.0"]) == 0
    assert json.loads(capsys.readouterr().out)["station"] == "1.0"


def test_the_start_rate_is_not_promised(capsys: pytest.CaptureFixture[str]) -> None:
    """What is kept and not enforced yet says so where it is set."""
    for command in ("create", "set"):
        cli.main(["accounts", command, "--help"])

        assert "(kept, not enforced yet)" in " ".join(capsys.readouterr().out.split())


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """`toque` alone lists the commands."""
    assert cli.main([]) == 0

    shown = capsys.readouterr().out
    assert all(f"\n  {command.split()[0]} " in shown for command in COMMANDS)


def test_the_version_is_shown_in_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    """`toque --version` is what people type who have not read the help."""
    assert (cli.main(["version"]), cli.main(["--version"])) == (0, 0)

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("toque ") and lines[:3] == lines[3:]


@pytest.mark.parametrize(("arguments", "message"), [
    (["nope"], "toque: No such command 'nope'; `toque --help`"),
    (["trigger"], "toque: Missing argument"),
    (["dev", "a.py", "--pods", "0"], "toque: Invalid value for '--pods'"),
    (["dev", "a.py", "--port", "70000"], "toque: Invalid value for '--port'"),
    (["dev", "a.py", "--ttl", "5"], "toque: --ttl is the bare number 5"),
    (["pods", "-o", "xml"], "toque: Invalid value for '--output'"),
    (["pods", "--account", "a b"], "toque: account 'a b' has ' ' at position 1"),
    (["instances"], "toque: Missing command"),
    (["instances", "pause"], "toque: which instances? name ids, - for standard input, or --all"),
    (["instances", "pause", "--status", "running"], "toque: which instances? add --all to mean all of those"),
    (["instances", "delete", "a", "--all"], "toque: name ids, or --all with filters, not both"),
    (["instances", "delete", "a b"], "toque: instance id 'a b' has ' ' at position 1"),
    (["instances", "resume", "--all", "--status", "running"], "toque: nothing would become of instances that are running"),
    (["instances", "restart", "a", "--from-kind", "sleep"], "toque: --from-kind says of what kind"),
    (["instances", "restart", "a", "--from", "fetch:0"], "toque: --from 'fetch:0' names no step"),
    (["trigger", "greet", "--keep-error", "7"], "toque: --keep-error is the bare number"),
    (["worker"], "toque: the following arguments are required: APP"),
    (["worker", "a.py", "--bogus"], "toque: unrecognized arguments: --bogus; `toque worker --help`"),
])
def test_wrong_usage_is_one_line_and_exit_2(
        arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The line says what is wrong; nothing goes to stdout."""
    assert cli.main(arguments) == 2

    shown = capsys.readouterr()
    assert shown.err.startswith(message) and shown.err.count("\n") == 1 and shown.out == ""


def test_a_server_that_is_away_is_exit_3(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is wrong with the call: scripts may try again. The line names the address."""
    assert cli.main(["pods", "--nats", "nats://127.0.0.1:1"]) == 3

    shown = capsys.readouterr().err
    assert shown.startswith("toque: cannot connect to NATS at nats://127.0.0.1:1") and shown.count("\n") == 1


def test_an_app_that_does_not_import_is_exit_2(tmp_path: Path) -> None:
    """The line names the place in the user's file; there is no traceback."""
    (tmp_path / "broken.py").write_text("import no_such_module\n")

    ended = run("worker", "broken.py", cwd=tmp_path)

    assert ended.returncode == 2 and "no_such_module" in ended.stderr and "broken.py:1" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_the_extra_the_exact_command_is_named() -> None:
    """One line says what to install, into this very Python."""
    ended = run("pods", python=("-c", WITHOUT_EXTRA))

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == ("toque: this command needs packages that are not installed: "
                            f"{sys.executable} -m pip install 'typer>=0.15' 'rich>=13'\n")


def test_a_pod_needs_no_extra() -> None:
    """Containers serve with a plain install."""
    ended = run("worker", "--help", python=("-c", WITHOUT_EXTRA))

    assert ended.returncode == 0 and "--grace" in ended.stdout


def test_the_extra_is_what_is_said_to_be_missing() -> None:
    """The message and pyproject.toml name the same packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert project["project"]["optional-dependencies"]["cli"] == list(cli.CLI_PACKAGES)
