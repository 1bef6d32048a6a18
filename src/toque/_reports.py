"""What a client shows of an account as a whole: its pods, stations, queues and workflows, and how many instances there are.

Figures are put together from several places at slightly different moments, so they are for people and for scaling,
not for decisions about single instances: those come from the owner of the instance's station.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from toque import _subjects
from toque._accounts import no_account, queue_workflows, read_account
from toque._protocol import (
    CountsRequest,
    CountsView,
    PodsRequest,
    PodView,
    QueueView,
    SessionRecord,
    StationView,
    encode,
)
from toque._requests import Deadline, Silence
from toque._subjects import StationId
from toque.errors import OwnerAway, UsageError
from toque.storage.ports import BusError, FeedSpec

if TYPE_CHECKING:
    from toque._requests import StationAsker
    from toque.storage.ports import Bus, Message, Randomness

PODS_S_MAX: Final = 1.0  # how long answers of pods are collected when not every live session has answered
PODS_S_MIN: Final = 0.3  # … when no session is known to be live
STATION_S_MAX: Final = 2.0  # how long a report of a station is asked for before it counts as without an owner
OLDEST_S_MAX: Final = 2.0
READS_IN_FLIGHT: Final = 32

T = TypeVar("T")

_EMPTY_REQUEST: Final = encode({}, json=False)

_decode_pod = msgspec.msgpack.Decoder(PodView).decode
_decode_station = msgspec.msgpack.Decoder(StationView).decode
_decode_counts = msgspec.msgpack.Decoder(CountsView).decode
_decode_session = msgspec.json.Decoder(SessionRecord).decode


@dataclass(frozen=True, slots=True)
class StationReport:
    """A station: its owner's view, or why there is none just now."""

    station: str
    view: StationView | None
    note: str = ""

    @property
    def pod(self) -> str:
        """The pod that owns it; empty when no owner answers."""
        return self.view.pod if self.view else ""


@dataclass(frozen=True, slots=True)
class StationQueue:
    """One workflow's queue at one station."""

    station: str
    pod: str
    """The owner; empty when none answers, and then the figures below are unknown (None)."""
    committed: int | None
    """Queue sequence up to which all is admitted, dropped or parked."""
    lag: int | None
    """From there to the station's last message, in sequences of the whole stream; 0 = nothing is queued here."""
    prefetched: int = 0
    queued: int | None = None
    """Messages queued here; counted on demand only."""
    counts: dict[str, int] = field(default_factory=dict)
    """Instances per status."""


@dataclass(frozen=True, slots=True)
class QueueReport:
    """One workflow's queue. `queued` is exact while each station has an owner, else it may count a little too much."""

    workflow: str
    queued: int
    limit: int
    parked: int
    """Messages that could not be accepted, still kept for people to look at (30 days at most): see `Client.dead`."""
    oldest: datetime | None
    """When the oldest queued creation was stored (UTC); None when nothing is queued, or it was not found in time."""
    oldest_age_s: float | None
    stations: list[StationQueue]
    parked_by_kind: dict[str, int] = field(default_factory=dict)
    """The parked ones by what they are: creations (`create`), events (`event`)."""


@dataclass(frozen=True, slots=True)
class WorkflowReport:
    """A workflow that was ever served here, and who serves it now: `pods` maps each live pod to its version."""

    workflow: str
    pods: dict[str, str]

    @property
    def served(self) -> bool:
        return bool(self.pods)


class Reports:
    """Makes the reports of one account."""

    def __init__(self, bus: Bus, account: str, asker: StationAsker, rng: Randomness, inbox_prefix: str) -> None:
        self._bus = bus
        self._account = account
        self._asker = asker
        self._rng = rng
        self._inbox_prefix = inbox_prefix

    # -- pods -----------------------------------------------------------------------------------------------------

    async def pods(self, *, count_tasks: bool = False) -> list[PodView]:
        """What each pod answers within PODS_S_MAX, by name; at once when every live session has answered."""
        expected = {record.session for record in await self.live_sessions()}
        answers: dict[str, PodView] = {}
        complete = asyncio.Event()

        def collect(message: Message) -> None:
            try:
                view = _decode_pod(message.data)
            except msgspec.MsgspecError:  # not a pod of this version: as if it had not answered
                return
            answers[view.session] = view
            if expected and expected <= answers.keys():
                complete.set()

        request = encode(PodsRequest(tasks=count_tasks), json=False)
        await self._broadcast(request, collect, complete, PODS_S_MAX if expected else PODS_S_MIN)
        return sorted(answers.values(), key=lambda view: (view.pod, view.session))

    async def _broadcast(self, request: bytes, collect: Callable[[Message], None], complete: asyncio.Event,
                         window_s: float) -> None:
        inbox = f"{self._inbox_prefix}.{self._rng.getrandbits(96):024x}"
        subscription = await self._bus.subscribe(inbox, collect)
        try:
            self._bus.emit(_subjects.pods(self._account), request, reply=inbox)
            async with asyncio.timeout(window_s):
                await complete.wait()
        except TimeoutError:
            return
        finally:
            await subscription.close()

    async def live_sessions(self) -> list[SessionRecord]:
        """The sessions whose keys are neither expired nor ended. Raises SetupError when there is no such account."""
        stream = _subjects.control_stream(self._account)
        every = _subjects.control_session(self._account, ">")
        try:
            info = await self._bus.stream_info(stream, subjects_filter=every)
        except BusError as refusal:
            if refusal.code == BusError.STREAM_NOT_FOUND:
                raise no_account(self._account) from refusal
            raise
        messages = await _gather_bounded([self._bus.last_message(stream, subject) for subject in info.subjects])
        records = [_decode_session(message.data) for message in messages if message is not None and message.data]
        return [record for record in records if not record.ended]

    # -- stations -------------------------------------------------------------------------------------------------

    async def stations(self) -> list[StationReport]:
        """Every station, those of the newest generation first. One without an owner says so in its note."""
        reports = [self._station(station) for station in await self._asker.stations()]
        return await _gather_bounded(reports)

    async def _station(self, station: StationId) -> StationReport:
        answer = await self._asker.at(station, "report", _EMPTY_REQUEST, Deadline(STATION_S_MAX))
        if isinstance(answer, Silence):
            return StationReport(str(station), None, f"no owner: {answer.reason}")
        if answer.code != "ok":
            return StationReport(str(station), None, answer.message or answer.code)
        return StationReport(str(station), _decode_station(answer.value))

    # -- queues ---------------------------------------------------------------------------------------------------

    async def queues(self, *, count_stations: bool = False) -> list[QueueReport]:
        """Every workflow's queue, by name.

        `count_stations` counts each station's messages, which is slow when the queue is deep.
        Raises SetupError when there is no such account, BrokerUnavailable.
        """
        account = await read_account(self._bus, self._account)
        workflows, stations, parked = await asyncio.gather(
            queue_workflows(self._bus, self._account), self.stations(), self._parked())
        return [await self._queue(workflow, account.queue_limit, stations, parked.get(workflow, {}), count_stations)
                for workflow in workflows]

    async def _queue(self, workflow: str, limit: int, stations: list[StationReport], parked: dict[str, int],
                     count: bool) -> QueueReport:
        info = await self._bus.stream_info(_subjects.queue_stream(self._account, workflow))
        parts = await _gather_bounded([self._part(workflow, report, count) for report in stations])
        views = [_queue_view(report, workflow) for report in stations]
        behind = sum(view.purgeable for view in views if view is not None)
        lagging = [part for part in parts if part.lag != 0]
        queued = max(info.messages - behind, 0) if lagging else 0
        oldest_ms = await self._oldest_ms(workflow, lagging) if queued else None
        return QueueReport(
            workflow=workflow, queued=queued, limit=limit, parked=sum(parked.values()), parked_by_kind=parked,
            oldest=None if oldest_ms is None else datetime.fromtimestamp(oldest_ms / 1000, UTC),
            oldest_age_s=None if oldest_ms is None else max(0.0, (info.server_time_ms - oldest_ms) / 1000),
            stations=parts)

    async def _parked(self) -> dict[str, dict[str, int]]:
        """How many messages are parked, by workflow and kind."""
        info = await self._bus.stream_info(_subjects.dead_stream(self._account),
                                           subjects_filter=_subjects.dead(self._account, "*", "*"))
        counts: dict[str, dict[str, int]] = {}
        for subject, number in info.subjects.items():
            kind, workflow = _subjects.parse_dead(subject)
            counts.setdefault(workflow, {})[kind] = number
        return counts

    async def _part(self, workflow: str, report: StationReport, count: bool) -> StationQueue:
        stream = _subjects.queue_stream(self._account, workflow)
        station = StationId.parse(report.station)
        filter_ = f"{_subjects.queue_prefix(self._account, workflow, station)}.*"
        last = await self._bus.last_message(stream, filter_)
        view = _queue_view(report, workflow)
        if report.view is None:
            lag = None if last else 0
            return StationQueue(report.station, "", None, lag, queued=await self._count(stream, filter_, 0, count))
        committed, purgeable = (view.committed, view.purgeable) if view else (0, 0)
        return StationQueue(
            station=report.station, pod=report.pod, committed=committed,
            lag=max(0, last.sequence - committed) if last else 0,
            prefetched=view.prefetched if view else 0,
            queued=await self._count(stream, filter_, purgeable, count),
            counts=view.counts if view else {})

    async def _count(self, stream: str, filter_: str, purgeable: int, wanted: bool) -> int | None:
        if not wanted:
            return None
        info = await self._bus.stream_info(stream, subjects_filter=filter_)
        return max(0, sum(info.subjects.values()) - purgeable)

    async def _oldest_ms(self, workflow: str, lagging: Iterable[StationQueue]) -> int | None:
        """When the oldest message behind the stations' committed positions was stored, in ms of broker time."""
        times = await _gather_bounded([self._first_ms(workflow, part) for part in lagging])
        return min((time for time in times if time is not None), default=None)

    async def _first_ms(self, workflow: str, part: StationQueue) -> int | None:
        first: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def arrived(messages: Sequence[Message]) -> None:
            if not first.done():
                first.set_result(messages[0].time_ms)

        prefix = _subjects.queue_prefix(self._account, workflow, StationId.parse(part.station))
        spec = FeedSpec(stream=_subjects.queue_stream(self._account, workflow), filters=(f"{prefix}.*",),
                        start_sequence=(part.committed or 0) + 1, name="oldest")
        feed = await self._bus.open_feed(spec, arrived)
        try:
            feed.want(1)
            async with asyncio.timeout(OLDEST_S_MAX):
                return await first
        except TimeoutError:  # admitted since
            return None
        finally:
            await feed.close()

    # -- workflows ------------------------------------------------------------------------------------------------

    async def workflows(self) -> list[WorkflowReport]:
        """Every workflow that has a queue or a live pod, by name."""
        names, sessions = await asyncio.gather(queue_workflows(self._bus, self._account), self.live_sessions())
        pods: dict[str, dict[str, str]] = {name: {} for name in names}
        for session in sessions:
            for workflow, version in session.workflows.items():
                pods.setdefault(workflow, {})[session.pod] = version
        return [WorkflowReport(workflow, dict(sorted(pods[workflow].items()))) for workflow in sorted(pods)]

    async def counts(self, workflow: str, timeout_s: float) -> dict[str, dict[str, int]]:
        """Instances by workflow and status, what is queued among them. Raises SetupError, OwnerAway, BrokerUnavailable."""
        request = encode(CountsRequest(workflow=workflow), json=False)
        stations = await self._asker.stations()
        names, views = await asyncio.gather(
            queue_workflows(self._bus, self._account),
            _gather_bounded([self._station_counts(station, request, timeout_s) for station in stations]))
        counts: dict[str, dict[str, int]] = {}
        for view in views:
            for name, by_status in view.instances.items():
                total = counts.setdefault(name, {})
                for status, count in by_status.items():
                    total[status] = total.get(status, 0) + count
        for name in names if not workflow else {workflow} & set(names):
            info = await self._bus.stream_info(_subjects.queue_stream(self._account, name))
            queued = info.messages - sum(view.purgeable.get(name, 0) for view in views)
            counts.setdefault(name, {})["queued"] = max(0, queued)
        return {name: dict(sorted(counts[name].items())) for name in sorted(counts)}

    async def _station_counts(self, station: StationId, request: bytes, timeout_s: float) -> CountsView:
        answer = await self._asker.at(station, "counts", request, Deadline(timeout_s))
        if isinstance(answer, Silence):
            raise OwnerAway(f"the counts are incomplete: {answer.reason}")
        if answer.code != "ok":
            raise UsageError(f"station {station} refuses to count: {answer.message or answer.code}")
        return _decode_counts(answer.value)


def _queue_view(report: StationReport, workflow: str) -> QueueView | None:
    if report.view is None:
        return None
    return next((queue for queue in report.view.queues if queue.workflow == workflow), None)


async def _gather_bounded(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; READS_IN_FLIGHT at a time."""
    places = asyncio.Semaphore(READS_IN_FLIGHT)

    async def one(call: Coroutine[Any, Any, T]) -> T:
        async with places:
            return await call

    return list(await asyncio.gather(*(one(call) for call in calls)))
