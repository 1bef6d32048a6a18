"""Promises of the real bus that a fake has no part in: the connection, its faults, the server's own fields.

What the Bus port promises is in `test_bus_conformance*.py`; feeds under faults are in `test_nats_feed.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from toque._nats_server import NatsServer
from toque.errors import BrokerUnavailable, PayloadTooLarge, SetupError
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import NatsOptions
from toque.storage.ports import BATCH_MESSAGES_MAX, BusTimeout, Message, NoResponders, StreamConfig
from toque.storage.server_check import SyncState, check_server

EVENTUALLY_S_MAX = 10.0
SUBJECTS_PAGE = 100_000  # of one STREAM.INFO answer


async def eventually(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds; TimeoutError after the deadline."""
    async with asyncio.timeout(EVENTUALLY_S_MAX):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def connected(url: str, **options: object) -> AsyncIterator[NatsBus]:
    bus = await NatsBus.connect(NatsOptions(servers=(url,), **options))
    try:
        yield bus
    finally:
        await bus.close()


@asynccontextmanager
async def serving(tmp_path, **settings: object) -> AsyncIterator[NatsServer]:
    server = NatsServer(tmp_path / "nats", **settings)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def kill(server: NatsServer) -> None:
    exited = server.exited
    server.kill()
    await exited


def certificates(directory: Path) -> tuple[Path, Path, Path]:
    """A self-signed certificate for 127.0.0.1 that is its own authority, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=toque-test",
                    "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return cert, cert, key


# -- connecting --------------------------------------------------------------------------------------------------------

def test_nobody_at_the_address_fails_at_once_and_says_what_to_do(run_async):
    """The first connection does not wait for a server that is not there, and shows no password."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    with pytest.raises(BrokerUnavailable, match=f"…@127.0.0.1:{port}.*NATS_URL") as caught:
        run_async(NatsBus.connect(NatsOptions(servers=(f"nats://me:hush@127.0.0.1:{port}",))), timeout_s=3)

    assert "hush" not in str(caught.value)


def test_a_refused_login_is_a_setup_error(nats_binary, run_async, tmp_path):
    """A wrong password is the caller's to mend, and is told at once."""
    login = 'authorization { user: "me", password: "secret" }'

    async def main() -> None:
        async with serving(tmp_path, extra_config=login) as server:
            async with connected(server.url, user="me", password="secret") as bus:
                await bus.require_jetstream()
            with pytest.raises(SetupError, match="refused the login"):
                await NatsBus.connect(NatsOptions(servers=(server.url,), user="me", password="wrong"))

    run_async(main())


def test_an_nkey_file_logs_in(nats_binary, run_async, tmp_path):
    """The options' nkey seed signs the server's nonce."""
    nkeys = pytest.importorskip("nkeys")
    seed = b"SUAMK2FG4MI6UE3ACF3FK3OIQBCEIEZV7NSWFFEW63UXMRLFM2XLAXK4GY"
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    (tmp_path / "me.nk").write_bytes(seed)

    async def main() -> None:
        async with (serving(tmp_path, extra_config=f'authorization {{ users: [{{ nkey: "{public}" }}] }}') as server,
                    connected(server.url, nkey=tmp_path / "me.nk") as bus):
            await bus.require_jetstream()

    run_async(main())


def test_one_address_of_several_is_enough(nats_url, run_async):
    """A server of the list that is not there does not keep us from the others."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        dead = f"nats://127.0.0.1:{probe.getsockname()[1]}"

    async def main() -> None:
        bus = await NatsBus.connect(NatsOptions(servers=(dead, nats_url)))
        await bus.require_jetstream()
        await bus.close()

    run_async(main())


def test_tls_checks_the_server_and_shows_our_own_certificate(nats_binary, run_async, tmp_path):
    """With the authority's file and a client certificate the connection stands; without them it is a SetupError."""
    ca, cert, key = certificates(tmp_path)
    config = f'tls {{ cert_file: "{cert}", key_file: "{key}", ca_file: "{ca}", verify: true }}'

    async def main() -> None:
        async with serving(tmp_path, extra_config=config) as server:
            async with connected(server.url, tls_ca=ca, tls_cert=cert, tls_key=key) as bus:
                await bus.require_jetstream()
            with pytest.raises(SetupError, match="no TLS with NATS"):
                await NatsBus.connect(NatsOptions(servers=(server.url,)))

    run_async(main())


def test_a_server_without_jetstream_is_refused_with_the_remedy(nats_binary, run_async, tmp_path):
    """An account without JetStream is found out before anything is stored."""
    accounts = "accounts { PLAIN { users: [{ user: a, password: a }] } }"

    async def main() -> None:
        async with (serving(tmp_path, extra_config=accounts) as server,
                    connected(server.url, user="a", password="a") as bus):
            with pytest.raises(SetupError, match=r"JetStream is not enabled .*nats-server with -js"):
                await bus.require_jetstream()

    run_async(main())


# -- the server's fitness ----------------------------------------------------------------------------------------------

class BusOf:
    """A bus to a server of some version."""

    def __init__(self, version: str) -> None:
        self.server_version = version

    async def require_jetstream(self) -> None:
        """It has JetStream."""


def test_a_server_that_is_too_old_is_refused(run_async):
    """The error names both versions."""
    with pytest.raises(SetupError, match=r"nats-server 2\.11\.12; Toque needs 2\.12\.0"):
        run_async(check_server(BusOf("2.11.12")))


def test_a_server_that_fsyncs_passes_the_strict_check(nats_url, shared_nats_server, run_async):
    """Its monitor says so."""
    async def main() -> SyncState:
        async with connected(nats_url) as bus:
            return await check_server(bus, shared_nats_server.monitor_url, require_sync=True)

    assert run_async(main()) is SyncState.ALWAYS


def test_lazy_and_unknown_fsync_are_told_apart_and_refused_on_demand(nats_binary, run_async, tmp_path):
    """Without the demand they are an answer (and a warning), with it a SetupError that says what to do."""
    async def main() -> None:
        async with serving(tmp_path, sync_always=False) as server, connected(server.url) as bus:
            assert await check_server(bus, server.monitor_url) is SyncState.LAZY
            assert await check_server(bus) is SyncState.UNKNOWN
            with pytest.raises(SetupError, match="set sync_interval: always"):
                await check_server(bus, server.monitor_url, require_sync=True)
            with pytest.raises(SetupError, match="--monitor URL"):
                await check_server(bus, require_sync=True)

    run_async(main())


def test_a_monitor_that_does_not_answer_is_named(nats_url, run_async):
    """A wrong --monitor is an error, not "unknown"."""
    async def main() -> None:
        async with connected(nats_url) as bus:
            with pytest.raises(SetupError, match=r"no nats-server monitor answers at http://127\.0\.0\.1:1/varz"):
                await check_server(bus, "http://127.0.0.1:1")

    run_async(main())


# -- a lost connection -------------------------------------------------------------------------------------------------

def test_what_is_published_without_a_connection_is_never_sent(nats_server, run_async):
    """Every call fails at once while the server is away, and nothing of it is stored after the reconnect."""
    async def main() -> None:
        async with connected(nats_server.url) as bus:
            await bus.ensure_stream(StreamConfig(name="s", subjects=["s.>"], allow_atomic=True))
            await kill(nats_server)
            await eventually(lambda: not bus.connected)

            begun = asyncio.get_running_loop().time()
            for attempt in (bus.publish("s.1", b""), bus.publish_batch([("s.2", b"", None), ("s.3", b"", None)]),
                            bus.request("s.4", b""), bus.stream_info("s"), bus.subscribe("x", print)):
                with pytest.raises(BusTimeout, match="nothing was sent"):
                    await attempt
            bus.emit("s.5", b"")
            assert asyncio.get_running_loop().time() - begun < 1

            await nats_server.start()
            await eventually(lambda: bus.connected)
            assert (await bus.publish("s.6", b"")).sequence == 1
            assert (await bus.stream_info("s")).messages == 1

    run_async(main())


def test_open_questions_end_when_the_connection_breaks(nats_server, run_async):
    """They end with BusTimeout long before their own time-out: the outcome is unknown."""
    async def main() -> None:
        async with connected(nats_server.url) as bus:
            await bus.ensure_stream(StreamConfig(name="s", subjects=["s.>"]))
            os.kill(nats_server.pid, signal.SIGSTOP)
            open_calls = [asyncio.create_task(call) for call in (
                bus.publish("s.1", b"", timeout_s=600), bus.request("nobody", b"", timeout_s=600))]
            await asyncio.sleep(0)

            await kill(nats_server)

            ends = await asyncio.wait_for(asyncio.gather(*open_calls, return_exceptions=True), EVENTUALLY_S_MAX)
            assert [type(end) for end in ends] == [BusTimeout, BusTimeout]
            assert all("the outcome is unknown" in str(end) for end in ends)

    run_async(main())


def test_what_waited_for_a_full_socket_is_dropped_with_the_connection(nats_server, run_async):
    """A stopped server that dies: nothing of what it did not read is sent to its successor."""
    async def main() -> None:
        async with connected(nats_server.url) as bus:
            await bus.ensure_stream(StreamConfig(name="s", subjects=["s.>"]))
            os.kill(nats_server.pid, signal.SIGSTOP)
            calls = [asyncio.create_task(bus.publish(f"s.{n}", bytes(1 << 20), timeout_s=600)) for n in range(40)]
            await eventually(lambda: bus._connection.clogged)  # the first went to the socket, the last wait for room

            await kill(nats_server)
            ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), EVENTUALLY_S_MAX)
            await nats_server.start()
            await eventually(lambda: bus.connected)

            assert {type(end) for end in ends} == {BusTimeout}
            assert (await bus.publish("s.after", b"")).sequence == 1

    run_async(main())


def test_a_stopped_server_ends_a_publish_at_its_time_out(nats_server, run_async):
    """BusTimeout after the time-out; the message may be stored afterwards, once."""
    async def main() -> None:
        async with connected(nats_server.url) as bus:
            await bus.ensure_stream(StreamConfig(name="s", subjects=["s.>"]))
            os.kill(nats_server.pid, signal.SIGSTOP)
            begun = asyncio.get_running_loop().time()

            with pytest.raises(BusTimeout, match=r"no answer on s\.1 within 0\.3 s"):
                await bus.publish("s.1", b"", timeout_s=0.3)

            assert 0.3 <= asyncio.get_running_loop().time() - begun < 1
            os.kill(nats_server.pid, signal.SIGCONT)
            assert (await bus.publish("s.2", b"")).sequence == 2

    run_async(main())


def test_a_cancelled_caller_leaves_the_bus_whole(nats_url, run_async):
    """An answer that nobody waits for any more disturbs no later call."""
    async def main() -> None:
        async with connected(nats_url) as bus:
            await bus.ensure_stream(StreamConfig(name="cancelled", subjects=["cancelled.>"]))
            call = asyncio.create_task(bus.publish("cancelled.1", b""))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

            assert (await bus.publish("cancelled.2", b"")).sequence == 2

    run_async(main())


def test_subscriptions_come_back_with_the_connection(nats_server, run_async):
    """After a server restart a service answers as before; a closed subscription stays closed."""
    async def main() -> None:
        async with connected(nats_server.url) as bus, connected(nats_server.url) as other:
            closed: list[Message] = []
            await bus.subscribe("twice", lambda message: bus.respond(message, message.data * 2))
            await (await bus.subscribe("twice", closed.append)).close()

            await kill(nats_server)
            await eventually(lambda: not (bus.connected or other.connected))
            await nats_server.start()
            await eventually(lambda: bus.connected and other.connected)

            assert (await other.request("twice", b"ab")).data == b"abab"
            assert not closed

    run_async(main())


def test_a_subscription_that_could_not_be_confirmed_is_none(nats_url, run_async):
    """Whoever gets BusTimeout has no handle to close it by: it must not go on answering in silence."""
    async def main() -> None:
        async with connected(nats_url) as bus:
            heard: list[Message] = []

            async def silent() -> None:
                raise BusTimeout("as the test ordered")

            confirm, bus._connection.flush = bus._connection.flush, silent
            with pytest.raises(BusTimeout):
                await bus.subscribe("unconfirmed", heard.append)
            bus._connection.flush = confirm
            with pytest.raises(NoResponders):
                await bus.request("unconfirmed", b"")

            assert not heard

    run_async(main())


def test_a_connection_closed_for_good_is_replaced(nats_server, run_async):
    """After an error that nats-py does not come back from, a new connection takes over with its subscriptions."""
    async def main() -> None:
        async with connected(nats_server.url) as bus:
            await bus.subscribe("twice", lambda message: bus.respond(message, message.data * 2))
            client = bus._connection._client
            client._transport.write(b"NOT A COMMAND\r\n")
            await eventually(lambda: client.is_closed)

            await eventually(lambda: bus.connected)

            assert (await bus.request("twice", b"ab")).data == b"abab"

    run_async(main())


def test_a_handler_that_raises_is_not_the_end_of_its_subscription(nats_url, run_async):
    """What it raised is logged, and the next message is handled."""
    async def main() -> None:
        async with connected(nats_url) as bus:
            seen: list[bytes] = []

            def handler(message: Message) -> None:
                seen.append(message.data)
                raise ValueError("mine")

            await bus.subscribe("raises", handler)
            bus.emit("raises", b"1")
            bus.emit("raises", b"2")
            await eventually(lambda: len(seen) == 2)
            assert seen == [b"1", b"2"]

    run_async(main())


@pytest.mark.parametrize("foreign", [
    pytest.param(b"PUB odd.\xff 1\r\n7\r\n", id="a subject that is no UTF-8"),
    pytest.param(b"PUB odd.1 reply.\xff 1\r\n7\r\n", id="a reply subject that is no UTF-8"),
    pytest.param(b"HPUB odd.1 6 7\r\nab\r\n\r\n7\r\n", id="headers without a beginning"),
    pytest.param(b"HPUB odd.1 18 19\r\nNATS/1.0 \xff\xff\xff\r\n\r\n\r\n7\r\n", id="a status that is no UTF-8"),
])
def test_no_message_of_others_ends_the_connection(nats_url, run_async, foreign):
    """The server passes on any bytes. What cannot be read is replaced, and the next message arrives as ever."""
    async def main() -> None:
        async with connected(nats_url) as bus:
            seen: list[bytes] = []
            await bus.subscribe("odd.*", lambda message: seen.append(message.data))
            host, _, port = nats_url.rpartition("/")[2].partition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b'CONNECT {"headers":true}\r\n' + foreign)
            await eventually(lambda: len(seen) == 1)
            bus.emit("odd.2", b"8")
            await eventually(lambda: len(seen) == 2)
            writer.close()

            assert seen == [b"7", b"8"]

    run_async(main())


def test_closing_ends_open_questions(nats_server, run_async):
    """Nobody waits for a bus that is gone."""
    async def main() -> None:
        bus = await NatsBus.connect(NatsOptions(servers=(nats_server.url,)))
        await bus.subscribe("silent", lambda message: None)
        call = asyncio.create_task(bus.request("silent", b"", timeout_s=600))
        await asyncio.sleep(0)

        await bus.close()

        with pytest.raises(BusTimeout, match="closed"):
            await call
        with pytest.raises(BusTimeout, match="nothing was sent"):
            await bus.publish("any", b"")

    run_async(main())


def test_closing_while_the_connection_is_lost_is_no_cancellation(nats_binary, tmp_path):
    """Whoever closes the bus in the moment in which nats-py begins to connect again goes on."""
    async def main() -> str:
        async with serving(tmp_path) as server:
            bus = await NatsBus.connect(NatsOptions(servers=(server.url,)))
            client = bus._connection._client
            server.kill()
            while client._reconnection_task is None:  # one step of the loop at a time: the moment is as short
                await asyncio.sleep(0)

            await bus.close()

            return "went on"

    assert asyncio.run(main()) == "went on"  # asyncio's own loop, as in the command line: uvloop has no such moment


# -- sizes -------------------------------------------------------------------------------------------------------------

def test_a_message_over_the_servers_limit_is_refused_here(nats_url, run_async):
    """Headers count; the largest that fits is sent, one byte more is refused, and the connection stays."""
    async def main() -> None:
        async with connected(nats_url) as bus:
            await bus.subscribe("size", lambda message: bus.respond(message, str(len(message.data)).encode()))
            headers = {"Toque-Nonce": "é"}
            largest = bus.max_payload - len(b"NATS/1.0\r\nToque-Nonce: ..\r\n\r\n")

            assert int((await bus.request("size", bytes(largest), headers)).data) == largest
            with pytest.raises(PayloadTooLarge) as caught:
                await bus.request("size", bytes(largest + 1), headers)
            assert (caught.value.size, caught.value.limit) == (bus.max_payload + 1, bus.max_payload)
            assert (await bus.request("size", b"")).data == b"0"

    run_async(main())


# -- streams -----------------------------------------------------------------------------------------------------------

def test_an_update_keeps_what_toque_does_not_set(nats_url, run_async):
    """An operator's compression, consumer limit and metadata stay; what StreamConfig has is set, defaults too."""
    async def main() -> None:
        async with connected(nats_url) as bus:
            theirs = {"name": "theirs", "subjects": ["theirs.>"], "storage": "file", "retention": "limits",
                      "compression": "s2", "max_consumers": 77, "metadata": {"team": "ops"}, "max_msgs": 5,
                      "discard": "new", "subject_transform": {"src": "theirs.*", "dest": "theirs.t.{{wildcard(1)}}"}}
            answer = await bus.request("$JS.API.STREAM.CREATE.theirs", json.dumps(theirs).encode())
            assert b'"error"' not in answer.data

            await bus.update_stream(StreamConfig(name="theirs", subjects=["theirs.>"], metadata={"toque": "1"}))

            config = (await bus.stream_info("theirs")).config
            assert (config["compression"], config["max_consumers"]) == ("s2", 77)
            assert {"team": "ops", "toque": "1"}.items() <= config["metadata"].items()
            assert (config["max_msgs"], config["discard"]) == (-1, "old")
            assert "subject_transform" not in config

    run_async(main())


def test_subject_counts_come_from_every_page(nats_url, run_async):
    """More subjects than one answer of the server holds are all counted."""
    subjects = [f"paged.{n}" for n in range(SUBJECTS_PAGE + 500)]

    async def main() -> None:
        async with connected(nats_url) as bus:
            await bus.ensure_stream(StreamConfig(name="paged", subjects=["paged.*"], allow_atomic=True))
            for first in range(0, len(subjects), BATCH_MESSAGES_MAX):
                await bus.publish_batch([(it, b"", None) for it in subjects[first:first + BATCH_MESSAGES_MAX]])

            info = await bus.stream_info("paged", subjects_filter="paged.*")

            assert info.subjects == dict.fromkeys(subjects, 1)
            await bus.delete_stream("paged")

    run_async(main())


def test_stream_names_come_from_every_page(nats_binary, run_async, tmp_path):
    """More streams than one answer of the server holds are all listed."""
    names = [f"many+{n:04}" for n in range(1_030)]

    async def main() -> None:
        async with serving(tmp_path, sync_always=False) as server, connected(server.url) as bus:
            for first in range(0, len(names), 50):
                await asyncio.gather(*(bus.ensure_stream(StreamConfig(name=name, subjects=[name]))
                                       for name in names[first:first + 50]))

            assert await bus.list_streams("many+") == names

    run_async(main())
