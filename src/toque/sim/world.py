"""A whole account in one virtual-time loop: pods that can be killed, clients, and a history of callback entries.

    def test_something() -> None:
        async def story(world: World) -> None:
            app = world.app(steps_workflow(world, "work", steps=3, step_s=0.5))
            a = await world.start_pod("a", app)             # returns when its session is open
            await world.all_owned()                         # … and this when every station has an owner that serves
            client = world.client()
            handle = await client.create("work", 7, id="one")
            await world.until(lambda: world.history.entered("one", "s1"), "step s1 was entered")
            a.kill()                                        # kill -9: its session's key stays until the TTL
            b = await world.start_pod("b", app)             # `a` again would end its own dead session at once
            assert await handle.result() == 7
            await world.quiet()                             # nothing is left in any pod's memory

        play(story, seed=1)                                 # World(seed, account=AccountRecord(…)) by keyword arguments

Nodes (`toque.sim.node.PodNode`): `kill()`, `await stop()` (SIGTERM), `pause()`, `resume()`; `bus.disconnect()` and
`bus.reconnect()` cut a pod's connection, `keeper_bus` its session's; `node.pod` is the Pod, `node.disk.tables` outlives
it. `world.broker` takes faults (`fail_next`, `freeze_stream`, `stop`, `start`). Callbacks report where they are:

    async def charge(ctx: StepContext) -> int:
        with world.history.inside(ctx):                     # the pod is known from who runs it
            await asyncio.sleep(1)

Anything that raised in a task or callback of the loop fails the test at the end, unless it is in `world.expected`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from toque import _subjects as subjects
from toque._accounts import ensure_account, update_account
from toque._app import App
from toque._protocol import AccountRecord, Answer, InstanceRequest, Layout, SessionRecord
from toque._subjects import StationId, station_number
from toque.client import Client
from toque.sim.history import History
from toque.sim.node import Disk, PodNode
from toque.sim.process import ProcessLoop
from toque.storage import records as r
from toque.storage.journal import decode_group, header_of
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.storage.ports import BusTimeout, Message, NoResponders
from toque.workers.session import decode_session
from toque.workers.station import Station
from toque.workflow import Step, StepContext, Workflow, WorkflowEvent, workflow_name

T = TypeVar("T")
STORY_S_MAX = 3_600.0  # of virtual time
POLL_S = 0.02
ACCOUNT = "main"
TTL_S = 10.0


@dataclass
class Grouped:
    """One journal message, decoded."""

    sequence: int
    header: r.GroupHeader
    records: list[Any] = field(default_factory=list)


class World:
    """See the module. One account, whose record is `account`."""

    def __init__(self, seed: int, *, account: AccountRecord | None = None,
                 delay_s: tuple[float, float] = (0.0001, 0.002)) -> None:
        self.rng = random.Random(seed)
        self.broker = MemoryBroker(random.Random(self.rng.getrandbits(64)), delay_s=delay_s)
        self.account = account or AccountRecord(name=ACCOUNT, stations=4, ttl_s=TTL_S)
        self.history = History()
        self.nodes: list[PodNode] = []
        self.disks: dict[str, Disk] = {}
        self.expected: tuple[type[BaseException], ...] = ()
        self.errors: list[BaseException] = []
        self._has_account = False
        self._decoded: dict[int, Grouped] = {}  # by journal sequence
        self.sessions_ended: dict[str, float] = {}  # when their keys said so first, in virtual time
        self._session_prefix = subjects.control_session(self.account.name, "")
        self._journaled: dict[str, list[Message]] = {}  # by subject, in order
        self.broker.on_stored = self._stored
        self.journal_watchers: list[Callable[[Message], None]] = []  # hear of each group when it is stored
        self.on_journal: Callable[[Message], None] = lambda message: None
        self.on_note: Callable[[str], None] = lambda text: None
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._failed)
        self._bus = MemoryBus(self.broker, "world")

    # -- pods and clients ----------------------------------------------------------------------------------------------

    def app(self, *flows: type[Workflow[Any, Any]]) -> App:
        """An app of these classes."""
        return App(workflows={workflow_name(flow): flow for flow in flows}, lifespan=None, reference="simulated",
                   files=[])

    async def start_pod(self, name: str, app: App, *, on_made: Callable[[PodNode], None] = lambda node: None,
                        **options: Any) -> PodNode:
        """Start a pod on its disk (made at first); options are those of PodNode. `on_made` gets it before it starts."""
        assert not any(node.name == name and node.alive for node in self.nodes), f"pod {name} runs already"
        if not self._has_account:
            await self.ensure_account()
            self._has_account = True
        node = PodNode(name, app, broker=self.broker, disk=self.disks.setdefault(name, Disk()),
                       rng=random.Random(self.rng.getrandbits(64)), account=self.account.name,
                       on_death=lambda node: self.history.died(node.process), pid=len(self.nodes) + 1, **options)
        self.nodes.append(node)
        on_made(node)
        await node.start()
        return node

    def client(self, bus: MemoryBus | None = None) -> Client:
        """A client, on a connection of its own if it is given none."""
        return Client(bus or MemoryBus(self.broker, "client"), account=self.account.name,
                      rng=random.Random(self.rng.getrandbits(64)), now_ms=self.broker.now_ms)

    def bus(self) -> MemoryBus:
        """A connection for a test's own messages."""
        return MemoryBus(self.broker, "test")

    async def ensure_account(self) -> Layout:
        _, layout = await ensure_account(self._bus, self.account.name, defaults=self.account)
        return layout

    async def change_account(self, **changes: Any) -> None:
        """`toque accounts set`."""
        await update_account(self._bus, self.account.name, **changes)

    async def publish(self, workflow: str, instance_id: str, body: bytes = b"7", *, nonce: str = "",
                      bus: MemoryBus | None = None) -> None:
        """A creation by plain NATS. Raises what the bus raises."""
        headers = {subjects.NONCE_HEADER: nonce} if nonce else None
        await (bus or self._bus).publish(subjects.create(self.account.name, workflow, instance_id), body, headers)

    async def ask(self, operation: str, workflow: str, instance_id: str, *, request: str = "", **fields: Any) -> Answer:
        """The owner's answer to one request, asked until it is not "retry" or silence."""
        asked = InstanceRequest(workflow=workflow, id=instance_id, request=request, **fields)
        while True:
            subject = subjects.station_request(self.account.name, self.station_of(instance_id), operation)
            with suppress(BusTimeout, NoResponders):
                reply = await self._bus.request(subject, msgspec.msgpack.encode(asked), timeout_s=2.0)
                answer = msgspec.msgpack.decode(reply.data, type=Answer)
                if answer.code not in ("retry", "moved"):
                    return answer
            await asyncio.sleep(POLL_S)

    def note(self, text: str) -> None:
        """Something that a trace should show."""
        self.on_note(text)

    # -- what is where -------------------------------------------------------------------------------------------------

    @property
    def living(self) -> list[PodNode]:
        return [node for node in self.nodes if node.alive]

    def stations(self) -> list[StationId]:
        return [StationId(1, number) for number in range(self.account.stations)]

    def station_of(self, instance_id: str) -> StationId:
        return StationId(1, station_number(instance_id, self.account.stations))

    def held(self, station: StationId) -> list[tuple[PodNode, Station]]:
        """Every living node that has the station in memory."""
        return [(node, node.pod.ownership.stations[station]) for node in self.living
                if hasattr(node, "pod") and node.pod.ownership is not None and station in node.pod.ownership.stations]

    def owner(self, station: StationId) -> PodNode:
        """The node whose epoch of the station is the highest."""
        holders = self.held(station)
        assert holders, f"nobody holds station {station}"
        return max(holders, key=lambda held: held[1].commits.tail.header.epoch)[0]

    def ids_at(self, station: StationId, count: int, prefix: str = "i") -> list[str]:
        """Instance ids that live at a station."""
        found: list[str] = []
        number = 0
        while len(found) < count:
            number += 1
            if self.station_of(f"{prefix}{number}") == station:
                found.append(f"{prefix}{number}")
        return found

    def journal(self, station: StationId) -> list[Grouped]:
        """Every group that the journal ever took for the station, past every delay."""
        return [self._decoded.get(message.sequence) or self._decode(message) for message in self.journal_messages(station)]

    def _decode(self, message: Message) -> Grouped:
        group = Grouped(message.sequence, header_of(message), list(decode_group(message)))
        self._decoded[message.sequence] = group
        return group

    def journal_messages(self, station: StationId) -> list[Message]:
        return self._journaled.get(subjects.journal(self.account.name, station), [])

    def _stored(self, stream: str, message: Message) -> None:
        """Every group is kept here, what is trimmed from the stream too, and the end of every session."""
        if stream == subjects.journal_stream(self.account.name):
            self._journaled.setdefault(message.subject, []).append(message)
            self.on_journal(message)
            for watch in list(self.journal_watchers):
                watch(message)
        elif message.subject.startswith(self._session_prefix):
            record = decode_session(message)
            if record is not None and record.ended:
                self.sessions_ended.setdefault(record.session, self.now)

    def kept_messages(self, station: StationId) -> list[Message]:
        """What the journal still holds."""
        return self.broker.stored(subjects.journal_stream(self.account.name),
                                  subjects.journal(self.account.name, station))

    def reread_journal(self) -> None:
        """The broker's journal was replaced by another one: from here on that is the journal."""
        self._decoded.clear()
        self._journaled.clear()
        for message in self.broker.stored(subjects.journal_stream(self.account.name)):
            self._journaled.setdefault(message.subject, []).append(message)

    def records(self, kind: type[T], station: StationId | None = None) -> list[T]:
        """Every journal record of a kind."""
        places = [station] if station is not None else self.stations()
        return [record for place in places for group in self.journal(place) for record in group.records
                if isinstance(record, kind)]

    def session_lives(self, session: str) -> bool:
        """Whether the session's key is there and not ended."""
        message = self.broker.last_message(subjects.control_stream(self.account.name),
                                           subjects.control_session(self.account.name, session))
        record = decode_session(message) if message is not None else None
        return record is not None and not record.ended

    def session_key(self, session: str) -> SessionRecord | None:
        """What a session's key says now; None for an expiry marker."""
        message = self.broker.last_message(subjects.control_stream(self.account.name),
                                           subjects.control_session(self.account.name, session))
        assert message is not None, f"session {session} has no key"
        return decode_session(message)

    def queued(self, workflow: str) -> list[Message]:
        return self.broker.stored(subjects.queue_stream(self.account.name, workflow))

    def parked(self) -> list[Message]:
        return self.broker.stored(subjects.dead_stream(self.account.name))

    # -- waiting -------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Virtual time."""
        return self._loop.time()

    def broker_ms(self, now: float) -> int:
        """Broker time at a virtual time."""
        return self.broker.epoch_ms + int(now * 1000)

    async def until(self, condition: Callable[[], Any], what: str, *, timeout_s: float = 60.0) -> None:
        """Let virtual time pass until the condition holds. AssertionError, naming `what`, after `timeout_s`."""
        give_up = self.now + timeout_s
        while not condition():
            assert self.now < give_up, f"not within {timeout_s:g} s: {what}"
            await asyncio.sleep(POLL_S)

    async def passes(self, seconds: float) -> None:
        """Let virtual time pass."""
        await asyncio.sleep(seconds)

    def is_owned(self, station: StationId) -> bool:
        """Whether a living pod holds the station, in time, and answers for it."""
        return any(held.in_time() and not held.frozen and station in node.pod.ownership._answers
                   and node.pod.ownership._answers[station]._subscription is not None
                   for node, held in self.held(station) if node.pod.ownership is not None)

    async def all_owned(self, *, timeout_s: float = 60.0) -> None:
        await self.until(lambda: all(self.is_owned(station) for station in self.stations()),
                         "every station has an owner", timeout_s=timeout_s)

    async def spread_over(self, *nodes: PodNode, timeout_s: float = 60.0) -> None:
        """Wait until all these pods have stations, as many as each other but for one."""

        def even() -> bool:
            loads = [len(node.pod.ownership.stations) for node in nodes if node.pod.ownership is not None]
            return max(loads) - min(loads) <= 1 and sum(loads) == self.account.stations

        await self.until(even, "the stations are spread evenly", timeout_s=timeout_s)
        await self.all_owned(timeout_s=timeout_s)

    async def quiet(self, *, timeout_s: float = 60.0) -> None:
        """Wait until no living pod has anything left in memory: slots, engines, timers, waiters."""
        await self.until(lambda: not self.leftovers(), "nothing is left in memory", timeout_s=timeout_s)

    def leftovers(self) -> list[str]:
        """What living pods still have in memory."""
        found: list[str] = []
        for node in self.living:
            if not node.served:
                continue
            context = node.pod.context
            counts = {"slots": context.slots.in_use, "callbacks": context.callbacks.inside,
                      "woken": len(context.slots._woken)}
            for station, held in (node.pod.ownership.stations if node.pod.ownership else {}).items():
                counts |= {f"{station} engines": len(held.engines), f"{station} ids": len(held.by_id),
                           f"{station} armed": len(held._armed), f"{station} leaving": len(held._leaving),
                           f"{station} waiters": len(held.waiters), f"{station} at the gate": len(held._at_gate),
                           f"{station} inside": held.inside, f"{station} admitting": len(held._admitting),
                           f"{station} events": held.events.waiting + held.events.under_way,
                           f"{station} time-outs": len(held.time_outs._asked)}
                counts |= {f"{station} {name} slots": chef.slots_in_use for name, chef in held.souschefs.items()}
                counts |= {f"{station} {name} under way": chef.under_way for name, chef in held.souschefs.items()}
                counts |= {f"{station} {name} buffered": chef.waiting for name, chef in held.souschefs.items()}
            found += [f"{node.name}: {count} {what}" for what, count in counts.items() if count]
        return found

    # -- the end -------------------------------------------------------------------------------------------------------

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None:
            self.errors.append(error)

    async def close(self) -> None:
        """Check what must hold after each story, and leave nothing behind in the loop."""
        unexpected = [error for error in self.errors if not isinstance(error, self.expected)]
        crashed = [(node.name, node.exited.exception()) for node in self.nodes
                   if node.exited is not None and node.exited.done() and node.exited.exception() is not None]
        for node in self.nodes:
            await node.bury()
        if unexpected:
            raise AssertionError(f"raised in the loop: {unexpected!r}") from unexpected[0]
        for name, error in crashed:
            if not isinstance(error, self.expected):
                raise AssertionError(f"pod {name} ended with {error!r}") from error


def play(story: Callable[[World], Coroutine[Any, Any, T]], *, seed: int = 1, account: AccountRecord | None = None) -> T:
    """Run a story in a world of its own, in virtual time."""

    async def main() -> T:
        world = World(seed, account=account)
        try:
            async with asyncio.timeout(STORY_S_MAX):
                result = await story(world)
        except BaseException:
            for node in world.nodes:
                await node.bury()
            raise
        await world.close()
        return result

    with asyncio.Runner(loop_factory=lambda: ProcessLoop(seed)) as runner:
        return runner.run(main())


def account(**settings: Any) -> AccountRecord:
    """The record of the account, as `World` makes it, with other settings."""
    return msgspec.structs.replace(AccountRecord(name=ACCOUNT, stations=4, ttl_s=TTL_S), **settings)


# -- small workflows ---------------------------------------------------------------------------------------------------

def steps_workflow(world: World, workflow: str = "work", *, steps: int = 1,
                   step_s: float = 0.1) -> type[Workflow[int, int]]:
    """A workflow of async steps s1, s2 … that take `step_s` each, report to the history, and return the params."""

    class Steps(Workflow[int, int], name=workflow):
        async def run(self, event: WorkflowEvent[int], step: Step) -> int:
            for number in range(1, steps + 1):
                await step.do(f"s{number}", reporting(world, event.payload, step_s))
            return event.payload

    return Steps


def sleeper_workflow(world: World, workflow: str = "nap", *, nap: str = "1 minute",
                     step_s: float = 0.0) -> type[Workflow[int, int]]:
    """A step `before`, a sleep `nap`, a step `after`."""

    class Sleeper(Workflow[int, int], name=workflow):
        async def run(self, event: WorkflowEvent[int], step: Step) -> int:
            await step.do("before", reporting(world, event.payload, step_s))
            await step.sleep("nap", nap)
            await step.do("after", reporting(world, event.payload, step_s))
            return event.payload

    return Sleeper


def reporting(world: World, value: int, step_s: float) -> Callable[..., Coroutine[Any, Any, int]]:
    """A callback that is inside for `step_s` and returns the value."""

    async def callback(ctx: StepContext) -> int:
        with world.history.inside(ctx):
            await asyncio.sleep(step_s)
        return value

    return callback
