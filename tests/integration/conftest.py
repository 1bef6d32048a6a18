"""Fixtures that run one test on every Bus implementation: in memory under several seeds, and on a real server."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pytest

from toque._nats_server import NatsServer
from toque.sim.loop import VirtualLoop, run
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import NatsOptions
from toque.storage.ports import Bus, BusError, Feed, FeedSpec, Message, StreamConfig

T = TypeVar("T")

MEMORY_SEEDS = range(5)
EVENTUALLY_S_MAX = 10.0
POLL_S = 0.01
QUIET_S = 1.0  # virtual: above any delay of the in-memory bus
QUIET_ROUND_TRIPS = 20
_made = itertools.count(1)


class Collected:
    """What a handler was given, in order."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def on_messages(self, messages: Sequence[Message]) -> None:
        self.messages.extend(messages)

    def on_message(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def bodies(self) -> list[bytes]:
        return [message.data for message in self.messages]

    @property
    def sequences(self) -> list[int]:
        return [message.sequence for message in self.messages]


class Stage(ABC):
    """Two connections to one server, and a name that no other test uses, for streams and as first subject token."""

    bus: Bus
    other: Bus

    def __init__(self) -> None:
        self.name = f"conform{os.getpid()}x{next(_made)}"

    def subject(self, *tokens: str) -> str:
        return ".".join((self.name, *tokens))

    async def stream(self, **config: Any) -> str:
        """Make a stream of this test's subjects. Returns its name."""
        config = {"name": self.name, "subjects": [self.subject(">")]} | config
        await self.bus.ensure_stream(StreamConfig(**config))
        return str(config["name"])

    async def publish(self, *tokens: str, data: bytes = b"", headers: dict[str, str] | None = None) -> int:
        """Store a message. Returns its sequence."""
        return (await self.bus.publish(self.subject(*tokens), data, headers)).sequence

    def collected(self) -> Collected:
        """An empty collection for a subscription's handler."""
        return Collected()

    async def feed(self, **spec: Any) -> tuple[Feed, Collected]:
        """Open a feed of the test's stream."""
        collected = Collected()
        spec = {"stream": self.name, "filters": (self.subject(">"),)} | spec
        return await self.bus.open_feed(FeedSpec(**spec), collected.on_messages), collected

    async def eventually(self, condition: Callable[[], Awaitable[T] | T], *, within_s: float = EVENTUALLY_S_MAX) -> T:
        """Poll until the condition is truthy, and return it; TimeoutError after the deadline."""
        async with asyncio.timeout(within_s):
            while True:
                outcome = condition()
                outcome = await outcome if inspect.isawaitable(outcome) else outcome
                if outcome:
                    return outcome
                await asyncio.sleep(POLL_S)

    async def refused(self, attempt: Awaitable[object]) -> BusError:
        """The refusal of something that must be refused."""
        with pytest.raises(BusError) as caught:
            await attempt
        return caught.value

    async def broker_time_reaches(self, time_ms: int) -> None:
        """Wait for the server's own clock."""

        async def reached() -> bool:
            return (await self.bus.stream_info(self.name)).server_time_ms >= time_ms

        await self.eventually(reached)

    @abstractmethod
    async def quiet(self) -> None:
        """Everything that is under way has arrived."""

    @abstractmethod
    async def stop_server(self) -> None:
        """Kill the server. Both connections have noticed it when this returns."""

    @abstractmethod
    async def start_server(self) -> None:
        """Start it again. Both connections are back when this returns."""


class MemoryStage(Stage):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self.broker = MemoryBroker(loop.rng)
        self.bus = MemoryBus(self.broker, "bus")
        self.other = MemoryBus(self.broker, "other")

    async def quiet(self) -> None:
        await asyncio.sleep(QUIET_S)

    async def stop_server(self) -> None:
        self.broker.stop()

    async def start_server(self) -> None:
        self.broker.start()
        await self.quiet()


class NatsStage(Stage):
    def __init__(self, bus: NatsBus, other: NatsBus, server: NatsServer | None) -> None:
        super().__init__()
        self.bus = bus
        self.other = other
        self._server = server

    async def quiet(self) -> None:
        """The server answers a connection in order, so what it sent before has arrived with the last round trip."""
        for _ in range(QUIET_ROUND_TRIPS):
            await self.bus.list_streams("")
            await self.other.list_streams("")

    async def stop_server(self) -> None:
        assert self._server is not None, "use the each_bus_alone fixture"
        self._server.kill()
        await self._server.exited
        await self.eventually(lambda: not self._connected())

    async def start_server(self) -> None:
        assert self._server is not None, "use the each_bus_alone fixture"
        await self._server.start()
        await self.eventually(self._connected)

    def _connected(self) -> bool:
        return all(isinstance(bus, NatsBus) and bus.connected for bus in (self.bus, self.other))


Check = Callable[[Stage], Awaitable[None]]
EachBus = Callable[[Check], None]


def _check_in_memory(check: Check) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        stage = MemoryStage(loop)
        await check(stage)
        await stage.bus.close()
        await stage.other.close()

    for seed in MEMORY_SEEDS:
        try:
            run(main(), seed=seed)
        except BaseException as error:
            error.add_note(f"in memory, seed {seed}")
            raise


async def _check_on_nats(check: Check, url: str, server: NatsServer | None) -> None:
    options = NatsOptions(servers=(url,))
    bus, other = await NatsBus.connect(options), await NatsBus.connect(options)
    stage = NatsStage(bus, other, server)
    try:
        await check(stage)
        if server is None:
            for name in await bus.list_streams(stage.name):
                await bus.delete_stream(name)
    finally:
        await bus.close()
        await other.close()


@pytest.fixture(params=["memory", "nats"])
def each_bus(request: pytest.FixtureRequest) -> EachBus:
    """A decorator that runs the check below it at once, on this test's bus."""

    def run_check(check: Check) -> None:
        if request.param == "memory":
            _check_in_memory(check)
        else:
            url = request.getfixturevalue("nats_url")
            request.getfixturevalue("run_async")(_check_on_nats(check, url, None))

    return run_check


@pytest.fixture(params=["memory", "nats"])
def each_bus_alone(request: pytest.FixtureRequest) -> EachBus:
    """Like `each_bus`, on a server of the test's own: it may stop it and start it again."""

    def run_check(check: Check) -> None:
        if request.param == "memory":
            _check_in_memory(check)
        else:
            server = request.getfixturevalue("nats_server")
            request.getfixturevalue("run_async")(_check_on_nats(check, server.url, server))

    return run_check
