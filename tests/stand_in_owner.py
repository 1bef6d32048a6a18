"""A tiny owner of all stations of an account, over any Bus: answers what pods answer, from a dictionary.

`new_place` puts one on an in-memory broker, with a client beside it.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec

from toque import _subjects
from toque._accounts import ensure_account, ensure_queue_stream
from toque._protocol import (
    AccountRecord,
    Answer,
    CountsView,
    InstanceRequest,
    InstanceView,
    ListPage,
    ListRequest,
    PodView,
    QueueView,
    RestartRequest,
    StationView,
    WatchPage,
    WatchRequest,
    WatchView,
)
from toque._subjects import NONCE_HEADER, StationId, station_number
from toque.client import Client
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.storage.ports import Bus, Message

QUEUE = "toque+main+queue+census"

_pack = msgspec.msgpack.encode


class StandInOwner:
    """Set `instances`, `epoch`, `muted`, `say` and read `asked`; open it with `await owner.open()`."""

    def __init__(self, bus: Bus, account: str = "main", stations: int = 8) -> None:
        self.bus = bus
        self.account = account
        self.stations = stations
        self.epoch = 1
        self.muted = False  # no answer at all
        self.say: list[Answer] = []  # the next answers, whatever is asked
        self.asked: list[tuple[str, str]] = []  # (station, operation)
        self.instances: dict[tuple[str, str], InstanceView] = {}
        self.events: dict[tuple[str, str], list[WatchView]] = {}  # for those who watch
        self.nonces: dict[tuple[str, str], str] = {}
        self.restarts: list[tuple[str, str, int, str]] = []  # (id, step's name, count, kind)
        self.purgeable: dict[str, int] = {}  # by workflow, at each station
        self.committed: dict[str, int] = {}  # by workflow, at each station
        self.pods = [("a", "session-a"), ("b", "session-b")]
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Any] = []

    async def open(self) -> StandInOwner:
        self._subscriptions = [
            await self.bus.subscribe(f"toque.{self.account}.station.*.*.*", self._hear),
            await self.bus.subscribe(_subjects.pods(self.account), self._report_pods),
        ]
        return self

    async def close(self) -> None:
        for subscription in self._subscriptions:
            await subscription.close()

    def put(self, workflow: str, instance_id: str, status: str, *, nonce: str = "", output: Any = None,
            **fields: Any) -> None:
        """An instance as the index holds it; wakes whoever waits for it."""
        if status == "complete":  # a Raw of no bytes that is not the default itself would be encoded as nothing
            fields["output"] = msgspec.Raw(_pack(output))
        view = InstanceView(workflow, instance_id, status, **fields)
        self.instances[workflow, instance_id] = view
        self.nonces[workflow, instance_id] = nonce
        self._changed.set()
        self._changed = asyncio.Event()

    def tell(self, workflow: str, instance_id: str, type_: str, *, value: Any = None, **fields: Any) -> None:
        """One more event of an instance; wakes whoever watches it."""
        events = self.events.setdefault((workflow, instance_id), [])
        events.append(WatchView(type_, 1000 + len(events), cursor=str(len(events) + 1),
                                value=msgspec.Raw(_pack(value)), **fields))
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch(self, data: bytes, station: str) -> Answer:
        request = msgspec.msgpack.decode(data, type=WatchRequest)
        events = self.events.get((request.workflow, request.id))
        if events is None:
            return Answer(self.epoch, "not_found")
        after = int(request.cursor or 0)
        try:
            async with asyncio.timeout(request.wait_s):
                while len(events) == after and events[-1].type != "workflow_completed":
                    await self._changed.wait()
        except TimeoutError:
            pass  # an empty page
        page = [event for event in events[after:] if not request.types or event.type in request.types]
        return self._ok(WatchPage(page, str(len(events)), ended=events[-1].type == "workflow_completed"))

    def _hear(self, message: Message) -> None:
        _, _, _, generation, number, operation = message.subject.split(".")
        self.asked.append((f"{generation}.{number}", operation))
        if not self.muted:
            task = asyncio.get_running_loop().create_task(self._answer(message, f"{generation}.{number}", operation))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: Message, station: str, operation: str) -> None:
        answer = self.say.pop(0) if self.say else await getattr(self, f"_{operation}")(message.data, station)
        self.bus.respond(message, _pack(answer))

    def _ok(self, value: Any) -> Answer:
        return Answer(self.epoch, value=msgspec.Raw(_pack(value)))

    async def _status(self, data: bytes, station: str) -> Answer:
        request = msgspec.msgpack.decode(data, type=InstanceRequest)
        view = self.instances.get((request.workflow, request.id))
        if view is not None:
            return self._ok(view)
        queued = await self._queued(request)
        if queued is None:
            return Answer(self.epoch, "not_found")
        return self._ok(InstanceView(request.workflow, request.id, "queued", created_at=queued.time_ms))

    async def _wait(self, data: bytes, station: str) -> Answer:
        request = msgspec.msgpack.decode(data, type=InstanceRequest)
        try:
            async with asyncio.timeout(request.wait_s):
                while not self._ended(request):
                    await self._changed.wait()
        except TimeoutError:
            pass  # answered as it stands
        return await self._status(data, station)

    def _ended(self, request: InstanceRequest) -> bool:
        view = self.instances.get((request.workflow, request.id))
        return view is not None and view.ended_at > 0

    async def _exists(self, data: bytes, station: str) -> Answer:
        request = msgspec.msgpack.decode(data, type=InstanceRequest)
        nonce = self.nonces.get((request.workflow, request.id))
        if nonce is None:
            queued = await self._queued(request)
            nonce = None if queued is None else queued.header(NONCE_HEADER)
        if nonce is None:
            return Answer(self.epoch, "not_found")
        return Answer(self.epoch, "ok" if nonce == request.nonce else "exists")

    async def _queued(self, request: InstanceRequest) -> Message | None:
        station = StationId(1, station_number(request.id, self.stations))
        return await self.bus.last_message(_subjects.queue_stream(self.account, request.workflow),
                                           _subjects.queue(self.account, request.workflow, station, request.id))

    async def _terminate(self, data: bytes, station: str) -> Answer:
        request = msgspec.msgpack.decode(data, type=InstanceRequest)
        if self._ended(request):
            return Answer(self.epoch, "ended", "it is complete")
        self.put(request.workflow, request.id, "terminated", ended_at=1)
        return self._ok(self.instances[request.workflow, request.id])

    async def _pause(self, data: bytes, station: str) -> Answer:
        return self._steer(data, "paused")

    async def _resume(self, data: bytes, station: str) -> Answer:
        return self._steer(data, "running")

    async def _restart(self, data: bytes, station: str) -> Answer:
        request = msgspec.msgpack.decode(data, type=RestartRequest)
        self.restarts.append((request.id, request.from_name, request.from_count, request.from_kind))
        if (request.workflow, request.id) not in self.instances:
            return Answer(self.epoch, "not_found")
        if request.from_name == "nowhere":
            return Answer(self.epoch, "no_step", "step 'nowhere' is not in the history")
        self.put(request.workflow, request.id, "running")
        return Answer(self.epoch)

    async def _delete(self, data: bytes, station: str) -> Answer:
        request = msgspec.msgpack.decode(data, type=InstanceRequest)
        gone = self.instances.pop((request.workflow, request.id), None)
        return Answer(self.epoch, "ok" if gone is not None else "not_found")

    def _steer(self, data: bytes, status: str) -> Answer:
        request = msgspec.msgpack.decode(data, type=InstanceRequest)
        if (request.workflow, request.id) not in self.instances:
            return Answer(self.epoch, "not_found")
        if self._ended(request):
            return Answer(self.epoch, "ended", "it is complete")
        self.put(request.workflow, request.id, status)
        return Answer(self.epoch)

    async def _list(self, data: bytes, station: str) -> Answer:
        request = msgspec.msgpack.decode(data, type=ListRequest)
        number = StationId.parse(station).number
        every = [(serial, view) for serial, view in enumerate(self.instances.values(), 1)
                 if station_number(view.id, self.stations) == number]
        if request.newest:
            every.reverse()
        mine = [(serial, view) for serial, view in every
                if request.workflow in ("", view.workflow) and (not request.status or view.status in request.status)
                and (not request.after or (serial < request.after if request.newest else serial > request.after))]
        rows = mine[:request.limit]
        return self._ok(ListPage([view for _, view in rows], rows[-1][0] if len(rows) < len(mine) else 0,
                                 [serial for serial, _ in rows]))

    async def _counts(self, data: bytes, station: str) -> Answer:
        number = StationId.parse(station).number
        counts: dict[str, dict[str, int]] = {}
        for view in self.instances.values():
            if station_number(view.id, self.stations) == number:
                by_status = counts.setdefault(view.workflow, {})
                by_status[view.status] = by_status.get(view.status, 0) + 1
        return self._ok(CountsView(counts, self.purgeable))

    async def _report(self, data: bytes, station: str) -> Answer:
        queues = [QueueView(workflow, committed) for workflow, committed in self.committed.items()]
        return self._ok(StationView(station, "a", "session-a", self.epoch, 7, 3, 2, 70, queues=queues))

    def _report_pods(self, message: Message) -> None:
        for pod, session in self.pods:
            view = PodView(pod, session, ["1.0"], 10, 3, 4, 0.5, {"census": "1"})
            self.bus.respond(message, _pack(view))


class Place:
    """An in-memory broker with the queue of the workflow `census`, a client, and an owner on its own connection."""

    def __init__(self, broker: MemoryBroker, client: Client, owner: StandInOwner) -> None:
        self.broker = broker
        self.client = client
        self.owner = owner

    def stored(self) -> list[Any]:
        return self.broker.stored(QUEUE)

    def stored_ids(self) -> list[str]:
        return [_subjects.parse_queue(message.subject).instance_id for message in self.stored()]

    def purge(self) -> None:
        """As the owner does behind its committed position."""
        self.broker.purge(QUEUE, ">", 10**9)


async def new_place(*, seed: int = 1, queue_limit: int = 2_000_000) -> Place:
    broker = MemoryBroker(random.Random(seed))
    pod = MemoryBus(broker)
    account, layout = await ensure_account(pod, "main", defaults=AccountRecord(name="main", queue_limit=queue_limit))
    await ensure_queue_stream(pod, account, layout, "census")
    owner = await StandInOwner(pod).open()
    return Place(broker, Client(MemoryBus(broker), rng=random.Random(seed)), owner)
