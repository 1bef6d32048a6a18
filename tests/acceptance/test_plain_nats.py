"""Creation by plain NATS: a TCP socket, the words CONNECT, SUB, PUB and HPUB, and nothing of Toque's client.

What any client in any language may rely on (subjects.md): the answers to a creation, and what becomes of each body.
"""

from __future__ import annotations

import base64
import json
import socket
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import pytest
from acceptance.stack import Terminal

from toque._subjects import station_number

pytestmark = pytest.mark.timeout(90)

T = TypeVar("T")

ANSWER_S_MAX = 10.0
START_S_MAX = 60.0
END_S_MAX = 40.0
POLL_S = 0.02
STATIONS = 8
APP = textwrap.dedent("""
    import os, pathlib
    from dataclasses import dataclass
    from toque import Workflow

    RUNS = pathlib.Path(__file__).with_name("runs")

    @dataclass
    class Guest:
        name: str
        seats: int = 1

    class Greet(Workflow[Guest, str], name="greet"):
        async def run(self, event, step):
            return await step.do("greet", self.greet, event.instance_id, event.payload)

        def greet(self, instance_id: str, guest: Guest) -> str:
            with RUNS.open("a") as file:
                print(instance_id, file=file)
            return f"Hello, {guest.name}, {guest.seats} seats"
""")


class Answered(NamedTuple):
    """One message that came back: its header block ("" without one) and its body."""

    header: str
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def no_responders(self) -> bool:
        return self.header.startswith("NATS/1.0 503")


class RawNats:
    """The NATS protocol by hand, on one blocking socket."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=ANSWER_S_MAX)
        self._file = self._socket.makefile("rb")
        self._requests = 0
        assert self._file.readline().startswith(b"INFO ")
        self.send(b'CONNECT {"verbose":false,"pedantic":false,"headers":true,"no_responders":true}\r\nSUB plain.* 1\r\n')

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def pub(self, subject: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
        """The bytes of a PUB or HPUB whose answer comes to the inbox."""
        self._requests += 1
        name, inbox = subject.encode(), b"plain.%d" % self._requests
        if headers is None:
            return b"PUB %s %s %d\r\n%s\r\n" % (name, inbox, len(body), body)
        block = "NATS/1.0\r\n" + "".join(f"{key}: {value}\r\n" for key, value in headers.items()) + "\r\n"
        head = block.encode()
        return b"HPUB %s %s %d %d\r\n%s%s\r\n" % (name, inbox, len(head), len(head) + len(body), head, body)

    def request(self, subject: str, body: bytes, headers: dict[str, str] | None = None) -> Answered:
        self.send(self.pub(subject, body, headers))
        return self.answer()

    def answer(self) -> Answered:
        """The next message; keeps the connection alive meanwhile."""
        while True:
            words = self._file.readline().split()
            if words[0] == b"PING":
                self.send(b"PONG\r\n")
            elif words[0] in (b"MSG", b"HMSG"):
                payload = self._file.read(int(words[-1]) + 2)[:-2]
                header = int(words[-2]) if words[0] == b"HMSG" else 0
                return Answered(payload[:header].decode(), payload[header:])
            else:
                assert words[0] in (b"INFO", b"PONG", b"+OK"), words

    # -- what a creator does -------------------------------------------------------------------------------------------

    def create(self, instance_id: str, body: bytes, *, workflow: str = "greet",
               headers: dict[str, str] | None = None) -> Answered:
        return self.request(f"toque.main.create.{workflow}.{instance_id}", body, headers)

    def ask(self, operation: str, instance_id: str, **more: Any) -> dict[str, Any]:
        """Ask the owner of the id, in JSON."""
        station = station_number(instance_id, STATIONS)
        request = {"workflow": "greet", "id": instance_id, **more}
        answer = self.request(f"toque.main.station.1.{station}.{operation}", json.dumps(request).encode())
        found: dict[str, Any] = answer.json
        return found

    def unknown(self, instance_id: str) -> bool:
        """Whether the owner says that there is no such instance."""
        return self.ask("status", instance_id).get("code") == "not_found"

    def ended(self, instance_id: str) -> dict[str, Any]:
        """The instance, once it has ended."""

        def value() -> dict[str, Any]:
            view: dict[str, Any] = self.ask("wait", instance_id, wait_s=1).get("value", {})
            return view if view.get("status") in ("complete", "errored", "terminated") else {}

        return until(value, f"{instance_id} ends")

    # -- what an onlooker sees -----------------------------------------------------------------------------------------

    def queued(self, instance_id: str) -> bool:
        """Whether the id's message lies in the queue stream."""
        subject = f"toque.main.queue.greet.1.{station_number(instance_id, STATIONS)}.{instance_id}"
        found = self.request("$JS.API.STREAM.MSG.GET.toque+main+queue+greet",
                             json.dumps({"last_by_subj": subject}).encode())
        return "message" in found.json

    def parked(self) -> dict[str, str]:
        """Everything on toque.main.dead.>: reason by the last token of the subject that it was stored under."""
        stream = "toque+main+dead"
        last: int = self.request(f"$JS.API.STREAM.INFO.{stream}", b"").json["state"]["last_seq"]
        found = {}
        for sequence in range(1, last + 1):
            message = self.request(f"$JS.API.STREAM.MSG.GET.{stream}", b'{"seq": %d}' % sequence).json["message"]
            lines = base64.b64decode(message["hdrs"]).decode().splitlines()
            headers = dict(line.split(": ", 1) for line in lines if ": " in line)
            assert message["subject"] == "toque.main.dead.create.greet"
            found[headers["Toque-Subject"].rpartition(".")[2]] = headers["Toque-Reason"]
        return found


def until(condition: Callable[[], T], what: str, within_s: float = ANSWER_S_MAX) -> T:
    """Poll until the condition is truthy, and return it."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {within_s:g} s in vain until {what}"
        time.sleep(POLL_S)
    return found


class Cluster(NamedTuple):
    """A running `toque dev`."""

    url: str
    runs_file: Path

    def runs(self, instance_id: str) -> int:
        """How often the callback of the instance was entered."""
        lines = self.runs_file.read_text().split() if self.runs_file.exists() else []
        return lines.count(instance_id)


@pytest.fixture(scope="module")
def cluster(nats_binary: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("plain")
    (directory / "greeter.py").write_text(APP)
    dev = directory / "dev"
    terminal = Terminal(["dev", str(directory / "greeter.py"), "--dir", str(dev)], env={}, log=directory / "log")
    try:
        until(lambda: "Ctrl-C ends all" in terminal.text or terminal.process.poll() is not None, "`toque dev` serves",
              START_S_MAX)
        assert terminal.process.poll() is None, terminal.text
        yield Cluster(json.loads((dev / "dev.json").read_text())["url"], directory / "runs")
        terminal.ctrl_c()
        until(lambda: terminal.process.poll() is not None, "`toque dev` has ended", END_S_MAX)
    finally:
        terminal.close()


@pytest.fixture
def raw(cluster: Cluster) -> Iterator[RawNats]:
    connection = RawNats(cluster.url)
    yield connection
    connection.close()


# -- creations that run ------------------------------------------------------------------------------------------------

def test_a_request_creates_an_instance_and_is_acknowledged(cluster: Cluster, raw: RawNats) -> None:
    """The answer is the stream's acknowledgement, and the instance runs to its end."""
    ack = raw.create("ada", b'{"name": "Ada", "seats": 2}').json

    assert ack["stream"] == "toque+main+queue+greet"
    assert ack["seq"] >= 1
    assert raw.ended("ada")["output"] == "Hello, Ada, 2 seats"
    assert cluster.runs("ada") == 1


def test_a_publish_without_a_reply_creates_too(cluster: Cluster, raw: RawNats) -> None:
    """Who does not want to know whether it was stored need not ask."""
    raw.send(b'PUB toque.main.create.greet.quiet 16\r\n{"name":"Quiet"}\r\n')

    view = until(lambda: raw.ask("wait", "quiet", wait_s=1).get("value"), "the quiet one is known")
    assert view["id"] == "quiet"
    assert raw.ended("quiet")["output"] == "Hello, Quiet, 1 seats"


def test_a_body_may_be_msgpack_by_its_header(cluster: Cluster, raw: RawNats) -> None:
    """HPUB with Content-Type: application/msgpack."""
    raw.create("packed", b"\x81\xa4name\xa3Bob", headers={"Content-Type": "application/msgpack"})

    assert raw.ended("packed")["output"] == "Hello, Bob, 1 seats"


# -- duplicates --------------------------------------------------------------------------------------------------------

def test_a_duplicate_of_a_queued_id_is_refused(cluster: Cluster, raw: RawNats) -> None:
    """Both arrive in one segment: the second gets error 10077, and there is one run."""
    subject, body = "toque.main.create.greet.twin", b'{"name": "Twin"}'

    raw.send(raw.pub(subject, body) + raw.pub(subject, body))
    first, second = raw.answer().json, raw.answer().json

    assert first["seq"] >= 1
    assert second["error"]["err_code"] == 10077
    assert "per subject" in second["error"]["description"]
    assert raw.ended("twin")["status"] == "complete"
    assert cluster.runs("twin") == 1


def test_a_duplicate_of_an_ended_id_changes_nothing(cluster: Cluster, raw: RawNats) -> None:
    """Once the id has left the queue a second creation is acknowledged (the instance exists), and dropped."""
    raw.create("late", b'{"name": "Late"}')
    before = raw.ended("late")
    until(lambda: not raw.queued("late"), "the owner has cleared the queue")

    again = raw.create("late", b'{"name": "Imposter"}').json

    assert again["seq"] >= 1
    until(lambda: not raw.queued("late"), "the owner has dropped the duplicate")
    assert raw.ended("late") == before
    assert cluster.runs("late") == 1


# -- bodies that do not fit --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("instance_id", "body", "headers", "reason"), [
    ("torn", b'{"name": "To', None, "truncated"),
    ("no-json", b"name=Ada", None, "malformed"),
    ("no-utf8", b'{"name": "\xff"}', None, "UTF-8"),
    ("empty", b"", None, "got `null`"),
    ("no-name", b'{"seats": 3}', None, "missing required field `name`"),
    ("wrong-type", b'{"name": "Ada", "seats": "three"}', None, "Expected `int`, got `str` - at `$.seats`"),
    ("no-msgpack", b"\xc1", {"Content-Type": "application/msgpack"}, "cannot be decoded"),
    ("xml", b"<name>Ada</name>", {"Content-Type": "application/xml"}, "application/xml"),
], ids=lambda value: value if isinstance(value, str) and value.isascii() and " " not in value else "")
def test_a_body_that_does_not_fit_becomes_an_errored_instance(
        cluster: Cluster, raw: RawNats, instance_id: str, body: bytes, headers: dict[str, str] | None,
        reason: str) -> None:
    """What was acknowledged never vanishes: the instance says what is wrong with it, and runs nothing."""
    ack = raw.create(instance_id, body, headers=headers).json

    view = raw.ended(instance_id)
    assert ack["seq"] >= 1
    assert view["status"] == "errored"
    assert view["error"]["type"] == "toque.errors.InvalidPayload"
    assert f"the params of greet/{instance_id}" in view["error"]["message"]
    assert reason in view["error"]["message"]
    assert cluster.runs(instance_id) == 0


def test_params_above_the_limit_are_parked_with_a_reason(cluster: Cluster, raw: RawNats) -> None:
    """A body just above 1 MiB passes the server, whose limit counts headers; the owner sets it aside."""
    size = 1024 * 1024 + 1
    raw.create("big", b'"' + b"x" * (size - 2) + b'"')

    reason = until(lambda: raw.parked().get("big"), "the message is parked")
    assert reason == f"the params have {size} bytes, more than 1048576"
    until(lambda: raw.unknown("big"), "the owner has cleared the queue")


def test_a_much_larger_body_is_refused_at_once(cluster: Cluster, raw: RawNats) -> None:
    """The stream's own limit: an error instead of an acknowledgement, nothing stored."""
    refused = raw.create("huge", b"x" * (2 * 1024 * 1024)).json

    assert refused["error"]["err_code"] == 10054
    assert not raw.queued("huge")


# -- ids and names of no legal form ------------------------------------------------------------------------------------

@pytest.mark.parametrize("instance_id", ["50%", "ü", "-dash", "*", ">", "x" * 101],
                         ids=["percent", "umlaut", "dash-first", "star", "greater", "too-long"])
def test_an_illegal_id_is_parked_with_a_reason(cluster: Cluster, raw: RawNats, instance_id: str) -> None:
    """One token, but no legal id: acknowledged, so it must not vanish; it is on toque.main.dead.> with the reason."""
    ack = raw.create(instance_id, b'{"name": "Ada"}').json

    reason = until(lambda: raw.parked().get(instance_id), "the message is parked")
    assert ack["seq"] >= 1
    assert "the id has no legal form" in reason
    until(lambda: raw.unknown(instance_id), "the owner has cleared the queue")
    assert cluster.runs(instance_id) == 0


def test_an_id_with_dots_reaches_nobody(cluster: Cluster, raw: RawNats) -> None:
    """More tokens than a creation has: no stream takes it, and the server says so at once."""
    assert raw.create("a.b", b'{"name": "Ada"}').no_responders


def test_an_unknown_workflow_reaches_nobody(cluster: Cluster, raw: RawNats) -> None:
    """A workflow that no pod has ever served has no queue: no responders, nothing stored."""
    assert raw.create("ada", b'{"name": "Ada"}', workflow="nothere").no_responders


def test_another_station_sends_a_question_on(cluster: Cluster, raw: RawNats) -> None:
    """Only the owner of an id's station may say "not found": a neighbour answers that it has moved."""
    neighbour = (station_number("nobody", STATIONS) + 1) % STATIONS
    question = b'{"workflow": "greet", "id": "nobody"}'

    answer = raw.request(f"toque.main.station.1.{neighbour}.status", question).json

    assert answer["code"] == "moved"
    assert raw.ask("status", "nobody")["code"] == "not_found"


def test_a_bad_message_blocks_nobody(cluster: Cluster, raw: RawNats) -> None:
    """Behind a parked message of the same station the next creation runs."""
    bad = "50%"
    good = next(name for name in (f"after-{n}" for n in range(1000))
                if station_number(name, STATIONS) == station_number(bad, STATIONS))
    raw.create(bad, b"null")

    raw.create(good, b'{"name": "Next"}')

    assert raw.ended(good)["status"] == "complete"
