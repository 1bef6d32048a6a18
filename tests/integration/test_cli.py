"""The commands of `toque` against a running `toque dev`, as a user in another terminal types them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from toque import cli
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import NatsOptions

pytestmark = [pytest.mark.usefixtures("nats_binary"), pytest.mark.timeout(90)]

SOURCE = Path(__file__).resolve().parents[2] / "src"
RUN_S_MAX = 40.0
APP = textwrap.dedent("""
    from toque import NonRetryableError, Workflow

    class Greet(Workflow, name="greet"):
        async def run(self, event, step):
            return await step.do("greet", self.greet, event.payload)
        async def greet(self, name):
            return f"hello {name}"

    class Fail(Workflow, name="fail"):
        async def run(self, event, step):
            await step.do("fine", self.fine)
            await step.do("break", self.break_)
        async def fine(self):
            return 1
        async def break_(self):
            raise NonRetryableError("broken \\x1b[2J")

    class Nap(Workflow, name="nap"):
        async def run(self, event, step):
            await step.sleep("nap", "1 hour")
""")


class Output(NamedTuple):
    """What a command printed."""

    stdout: str
    stderr: str


class Terminal:
    """A directory in which a `toque dev` runs; `toque` runs a command in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.banner = ""
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("NATS_", "TOQUE_"))}
        self.env["PYTHONPATH"] = str(SOURCE)
        self.env["XDG_CONFIG_HOME"] = str(directory)

    def start_dev(self) -> subprocess.Popen[str]:
        """Returns when the banner is printed; it is kept."""
        dev = subprocess.Popen([sys.executable, "-m", "toque", "dev", "cli_app.py"], cwd=self.directory, env=self.env,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert dev.stdout is not None
        for line in dev.stdout:
            self.banner += line
            if "Ctrl-C ends all in order" in line:
                return dev
        raise AssertionError(f"toque dev ended:\n{self.banner}")

    def toque(self, *arguments: str, code: int = 0) -> Output:
        """Run a command to its end, which must have the exit code. In this process: a new one takes a second."""
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, chdir(self.directory):
            found = cli.main(arguments)
        output = Output(out.getvalue(), err.getvalue())
        assert found == code, output
        assert "Traceback" not in output.stderr and "\x1b" not in output.stdout + output.stderr
        return output

    def report(self, *arguments: str, code: int = 0) -> Any:
        """The JSON that a command prints."""
        return json.loads(self.toque(*arguments, "-o", "json", code=code).stdout)


@pytest.fixture(scope="module")
def terminal(nats_binary: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path_factory.mktemp("cli"))
    (terminal.directory / "cli_app.py").write_text(APP)
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - terminal.env.keys():
            patch.delenv(name)
        patch.setenv("XDG_CONFIG_HOME", str(terminal.directory))
        dev = terminal.start_dev()
        yield terminal
        dev.send_signal(signal.SIGINT)
        dev.communicate(timeout=RUN_S_MAX)


def test_the_banner_says_what_runs_and_what_to_try(terminal: Terminal) -> None:
    """The command that the banner names works as it stands."""
    assert all(text in terminal.banner for text in ("nats://127.0.0.1:", "pod-1", "pod-2", "greet (version 1)"))
    command = next(line for line in terminal.banner.splitlines() if line.startswith("  try "))
    assert command.split(maxsplit=2)[2].startswith("trigger ")

    ended = terminal.toque("trigger", "greet", "{}", "--wait")

    assert json.loads(ended.stdout) == "hello {}"


# -- trigger -----------------------------------------------------------------------------------------------------------

def test_trigger_prints_the_id_alone(terminal: Terminal) -> None:
    """A script can go on with what stands on stdout."""
    instance_id = terminal.toque("trigger", "greet", '"you"', "--id", "printed-1").stdout

    assert instance_id == "printed-1\n"
    assert terminal.toque("instances", "watch", "printed-1").stdout.endswith('workflow_completed  "hello you"\n')


def test_a_second_creation_of_an_id_fails(terminal: Terminal) -> None:
    """The line says that the id is taken; exit code 1."""
    terminal.toque("trigger", "greet", '"you"', "--id", "twice-1")

    ended = terminal.toque("trigger", "greet", '"me"', "--id", "twice-1", code=1)

    assert "twice-1" in ended.stderr and ended.stderr.startswith("toque: ")


def test_waiting_for_an_instance_that_fails_is_exit_1(terminal: Terminal) -> None:
    """The error is shown, with what to look at next."""
    ended = terminal.toque("trigger", "fail", "--wait", code=1)

    assert "broken \\x1b[2J" in ended.stderr and "toque instances describe" in ended.stderr


def test_many_are_created_and_waited_for(terminal: Terminal) -> None:
    """--count creates so many; --wait says how they ended."""
    ended = terminal.toque("trigger", "greet", '"you"', "--count", "300", "--wait")

    assert ended.stdout == "300 complete\n"
    assert ended.stderr.startswith("created 300 instances of greet in ")


def test_an_unknown_workflow_is_said_so(terminal: Terminal) -> None:
    """The line names those that there are, once."""
    ended = terminal.toque("trigger", "nope", "{}", code=1)

    assert "'nope'" in ended.stderr and ended.stderr.count("fail, greet, nap") == 1


def test_a_bad_id_is_refused(terminal: Terminal) -> None:
    """Nothing is created for an id that has no legal form."""
    for instance_id in ("a.b", "a*", "a b", "a\nb", ""):
        assert "instance id" in terminal.toque("trigger", "greet", "1", "--id", instance_id, code=2).stderr


# -- instances ---------------------------------------------------------------------------------------------------------

def test_instances_are_listed_newest_first(terminal: Terminal) -> None:
    """The last one created is the first one shown; filters and limit hold."""
    for instance_id in ("list-1", "list-2", "list-3"):
        terminal.toque("trigger", "greet", '"you"', "--id", instance_id, "--wait")

    rows = terminal.report("instances", "list", "--workflow", "greet", "--status", "complete", "--limit", "2")

    assert [row["id"] for row in rows] == ["list-3", "list-2"]
    assert {row["status"] for row in rows} == {"complete"}


def test_a_list_does_not_say_that_a_failed_instance_has_no_error(terminal: Terminal) -> None:
    """Lists carry neither outputs nor errors, so a JSON list has no such fields; a description has."""
    terminal.toque("trigger", "fail", "1", "--id", "listed-failure", "--wait", code=1)

    row = terminal.report("instances", "list", "--status", "errored", "--limit", "1")[0]

    assert row["id"] == "listed-failure" and not {"error", "output"} & row.keys()
    assert "broken" in terminal.report("instances", "describe", "listed-failure")["error"]["message"]


def test_who_lists_queued_instances_is_told_the_command(terminal: Terminal) -> None:
    """The line names what can be typed."""
    ended = terminal.toque("instances", "list", "--status", "queued", code=2)

    assert "`toque queues`" in ended.stderr and "()" not in ended.stderr


def test_a_list_that_is_cut_says_so(terminal: Terminal) -> None:
    """Nobody takes the newest instances for all there are; stdout holds the report alone."""
    for number in range(3):
        terminal.toque("trigger", "greet", "1", "--id", f"cut-{number}", "--wait")

    cut, whole = (terminal.toque("instances", "list", "--limit", limit) for limit in ("2", "1000"))
    cursor = cut.stderr.partition("--cursor ")[2].split()[0]
    following = terminal.toque("instances", "list", "--limit", "2", "--cursor", cursor)

    assert len(cut.stdout.splitlines()) == 3
    assert whole.stderr == ""
    shown = cut.stdout.splitlines() + following.stdout.splitlines()[1:]
    assert [line.split()[0] for line in shown] == [line.split()[0] for line in whole.stdout.splitlines()[:5]]


def test_ids_are_listed_for_pipes_and_instances_counted(terminal: Terminal) -> None:
    """One id a line, by prefix and time, the oldest first on demand; the count agrees."""
    for number in range(3):
        terminal.toque("trigger", "greet", "1", "--id", f"piped-{number}", "--wait")

    listed = terminal.toque("instances", "list", "--id-prefix", "piped-", "--oldest", "--created-after", "1 hour",
                            "-o", "ids")
    none = terminal.toque("instances", "list", "--id-prefix", "piped-", "--ended-before", "1 hour", "-o", "ids")

    assert (listed.stdout, none.stdout) == ("piped-0\npiped-1\npiped-2\n", "")
    assert terminal.report("instances", "count", "-w", "greet")["greet"]["complete"] >= 3


def test_the_latest_is_found_by_name(terminal: Terminal) -> None:
    """`latest` is the newest instance, of one workflow where one is named."""
    terminal.toque("trigger", "greet", '"you"', "--id", "newest-greet", "--wait")
    terminal.toque("trigger", "fail", "--id", "newest-fail", "--wait", code=1)

    assert terminal.report("instances", "describe", "latest")["id"] == "newest-fail"
    assert terminal.report("instances", "describe", "latest", "-w", "greet")["id"] == "newest-greet"


def test_a_description_shows_steps_and_payloads(terminal: Terminal) -> None:
    """Params, steps with results or errors, and how it ended."""
    terminal.toque("trigger", "fail", '{"n": 1}', "--id", "described-1", "--wait", code=1)

    view = terminal.report("instances", "describe", "described-1")
    text = terminal.toque("instances", "describe", "described-1").stdout

    assert (view["status"], view["params"], view["workflow"]) == ("errored", {"n": 1}, "fail")
    assert [(step["name"], step["status"], step["output"]) for step in view["steps"]] == [
        ("fine", "complete", 1), ("break", "failed", None)]
    assert "fail/described-1" in text and "NonRetryableError: broken \\x1b[2J" in text


def until_it_sleeps(watcher: subprocess.Popen[str]) -> None:
    """Read what `instances watch` shows up to the sleep; ends the watcher when that never comes."""
    assert watcher.stdout is not None
    for line in watcher.stdout:
        if "sleep_started" in line:
            return
    raise AssertionError("the watcher has ended, and showed no sleep")


def test_a_sleeper_can_be_watched_and_terminated(terminal: Terminal) -> None:
    """The watcher sees the end that another terminal makes; exit code 1, since it did not complete."""
    terminal.toque("trigger", "nap", "--id", "nap-1")
    with subprocess.Popen([sys.executable, "-m", "toque", "instances", "watch", "nap-1"], cwd=terminal.directory,
                          env=terminal.env, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        until_it_sleeps(watcher)

        ended = terminal.toque("instances", "terminate", "nap-1")

        assert ended.stdout == "terminated nap/nap-1\n"
        assert "workflow_terminated" in watcher.stdout.read().splitlines()[-1]
        assert watcher.wait(RUN_S_MAX) == 1


def test_ctrl_c_leaves_a_watched_instance_alone(terminal: Terminal) -> None:
    """Whoever stops watching gets exit code 130 and no traceback; the instance goes on."""
    terminal.toque("trigger", "nap", "--id", "nap-3")
    with subprocess.Popen([sys.executable, "-m", "toque", "instances", "watch", "nap-3"], cwd=terminal.directory,
                          env=terminal.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        until_it_sleeps(watcher)

        watcher.send_signal(signal.SIGINT)

        _, complaint = watcher.communicate(timeout=RUN_S_MAX)
        assert (watcher.returncode, complaint) == (130, "")
    assert terminal.report("instances", "describe", "nap-3")["status"] == "waiting"
    terminal.toque("instances", "terminate", "nap-3")


def test_what_has_ended_cannot_be_terminated(terminal: Terminal) -> None:
    """The line says so; exit code 1; ids after it are still done."""
    terminal.toque("trigger", "greet", '"you"', "--id", "done-1", "--wait")
    terminal.toque("trigger", "nap", "--id", "nap-2")

    ended = terminal.toque("instances", "terminate", "done-1", "nap-2", code=1)

    assert "greet/done-1 has ended already" in ended.stderr
    assert ended.stdout == "terminated nap/nap-2\n"


def test_an_unknown_instance_is_said_so(terminal: Terminal) -> None:
    """Only owners say so, after every workflow was asked."""
    ended = terminal.toque("instances", "describe", "no-such-id", code=1)

    assert ended.stderr == "toque: no workflow of the account 'main' has an instance 'no-such-id'\n"


def test_an_id_in_two_workflows_needs_the_workflow(terminal: Terminal) -> None:
    """It is never guessed which of two instances was meant."""
    for workflow, code in (("greet", 0), ("fail", 1)):
        terminal.toque("trigger", workflow, "1", "--id", "both-1", "--wait", code=code)

    assert "name one with --workflow" in terminal.toque("instances", "describe", "both-1", code=2).stderr
    assert terminal.report("instances", "describe", "both-1", "-w", "fail")["status"] == "errored"


# -- reports -----------------------------------------------------------------------------------------------------------

def test_reports_show_the_account(terminal: Terminal) -> None:
    """Pods, stations, queues and workflows agree on who serves what."""
    pods, stations = terminal.report("pods"), terminal.report("stations")
    queues, workflows = terminal.report("queues"), terminal.report("workflows")

    assert [pod["pod"] for pod in pods] == ["pod-1", "pod-2"]
    assert sorted(station for pod in pods for station in pod["stations"]) == [row["station"] for row in stations]
    assert all(row["view"]["pod"] in ("pod-1", "pod-2") for row in stations)
    assert [queue["workflow"] for queue in queues] == ["fail", "greet", "nap"]
    assert {row["workflow"]: row["pods"] for row in workflows}["greet"] == {"pod-1": "1", "pod-2": "1"}


@pytest.mark.parametrize("command", ["pods", "stations", "queues", "workflows", "queues --stations", "instances list",
                                     "accounts list"])
def test_every_report_is_a_table_too(command: str, terminal: Terminal) -> None:
    """A heading and rows, one line each."""
    lines = terminal.toque(*command.split()).stdout.splitlines()

    assert len(lines) > 1 and lines[0] == lines[0].lower()


# -- parked messages ---------------------------------------------------------------------------------------------------

def publish(terminal: Terminal, subject: str, body: bytes, **headers: str) -> None:
    """As any NATS client does."""
    url = next(word for word in terminal.banner.split() if word.startswith("nats://"))

    async def main() -> None:
        bus = await NatsBus.connect(NatsOptions(servers=(url,)))
        await bus.publish(subject, body, {name.replace("_", "-"): text for name, text in headers.items()})
        await bus.close()

    asyncio.run(main())


def test_a_parked_creation_is_listed_shown_and_dropped(terminal: Terminal) -> None:
    """From the pod that could not accept it to the operator who has seen it: with its reason, by its sequence."""
    publish(terminal, "toque.main.create.greet.50%", b'"you"', Toque_Nonce="n1")
    until = time.monotonic() + RUN_S_MAX
    while not (rows := terminal.report("dead", "list")):
        assert time.monotonic() < until, "it is parked"

    [row] = rows
    sequence = str(row["sequence"])
    shown = terminal.toque("dead", "show", sequence).stdout
    refused = terminal.toque("dead", "retry", sequence, code=2)

    assert (row["workflow"], row["id"], "legal form" in row["reason"]) == ("greet", "50%", True)
    assert '"you"' in shown and "Toque-Nonce: n1" in shown and "must fail" in shown
    assert "was not retried" in refused.stderr
    assert terminal.report("queues")[1]["parked_by_kind"] == {"create": 1}
    assert "`toque dead list` shows" in terminal.toque("queues").stderr
    assert terminal.toque("dead", "drop", "--all", "--workflow", "greet").stdout == f"dropped {sequence}\n"
    assert terminal.report("dead", "list") == []
    assert terminal.toque("dead", "list").stderr.startswith("no parked messages")


def test_a_retried_creation_runs(terminal: Terminal) -> None:
    """What was parked for a reason that is gone becomes an instance, once."""
    publish(terminal, "toque.main.dead.create.greet", b'"again"', Toque_Reason="for a test",
            Toque_Subject="toque.main.queue.greet.1.0.was-parked")
    [row] = terminal.report("dead", "list", "--reason", "for a test")

    assert terminal.toque("dead", "retry", str(row["sequence"])).stdout == f"retried {row['sequence']}\n"

    terminal.toque("instances", "watch", "was-parked")
    assert terminal.report("instances", "describe", "was-parked")["output"] == "hello again"
    assert terminal.report("dead", "list") == []


def test_accounts_are_made_changed_and_shown(terminal: Terminal) -> None:
    """Settings are kept; what is not named stays; a wrong one is refused and changes nothing."""
    terminal.toque("accounts", "create", "shop", "--max-concurrent", "200", "--stations", "4", "--ttl", "8s")
    terminal.toque("accounts", "set", "shop", "--queue-limit", "1000", "--start-rate", "50")
    refused = terminal.toque("accounts", "set", "shop", "--max-concurrent", "0", code=2)

    account = terminal.report("accounts", "describe", "shop")

    assert "max_concurrent must be between" in refused.stderr
    assert (account["max_concurrent"], account["stations"], account["ttl_s"], account["queue_limit"]) == (
        200, 4, 8.0, 1000)
    assert [row["name"] for row in terminal.report("accounts", "list")] == ["main", "shop"]


def test_json_reports_hold_what_is_at_its_default(terminal: Terminal) -> None:
    """A program finds every setting and figure that the table shows."""
    account, pod = terminal.report("accounts", "describe", "main"), terminal.report("pods")[0]
    queue = terminal.report("stations")[0]["view"]["queues"][0]

    assert (account["max_concurrent"], account["stations"], account["replicas"]) == (50_000, 8, 1)
    assert terminal.report("accounts", "list")[0] == account
    assert (pod["journal"], pod["threads_in_use"]) == ("ok", 0)
    assert pod["started_at"].endswith("Z"), "times are ISO 8601, in UTC"
    assert queue["prefetched"] == 0


def test_an_account_without_pods_says_what_to_do(terminal: Terminal) -> None:
    """Empty states name the next command."""
    terminal.toque("accounts", "create", "empty")

    assert "no pods serve the account 'empty'; start one with" in terminal.toque("pods", "--account", "empty").stderr
    assert "no pods serve" in terminal.toque("queues", "--account", "empty").stderr
    assert terminal.report("pods", "--account", "empty") == []


def test_an_account_that_is_not_there_is_said_so(terminal: Terminal) -> None:
    """The line names the command that makes it."""
    ended = terminal.toque("pods", "--account", "nowhere", code=1)

    assert "toque accounts create nowhere" in ended.stderr
