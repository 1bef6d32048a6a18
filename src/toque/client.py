"""The asyncio client: creates instances, asks about them, ends them, and shows what an account is doing.

It holds one connection and no state worth keeping: everything that it was told is acknowledged by the broker or by an
owner, so a client may be killed anywhere. Waiting is done by asking again; nothing is remembered at the server for it.
"""

from __future__ import annotations

import asyncio
import builtins
import random
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar, Unpack, overload

import msgspec

from toque import _payload
from toque._accounts import Accounts
from toque._connecting import Opening
from toque._creation import BatchCreator, BatchResult, Creator, NewInstance
from toque._dead import DeadMessages
from toque._deletion import DeleteResult, checked_ids, delete_each
from toque._durations import Duration, format_ms, to_ms
from toque._lists import PAGE_ROWS_DEFAULT, ListFilters, Lists, list_request
from toque._names import approval_type, check_account, check_event_type, check_instance_id, check_workflow
from toque._protocol import (
    Answer,
    ApprovalPayload,
    DescribeView,
    ErrorView,
    EventRequest,
    InstanceRequest,
    InstanceView,
    PodView,
    RestartRequest,
    TerminateRequest,
)
from toque._reports import QueueReport, Reports, StationQueue, StationReport, WorkflowReport
from toque._requests import Deadline, Pauses, Silence, StationAsker
from toque._watch import WatchEvent, subscribe, watch
from toque.errors import (
    BrokerUnavailable,
    EventRefused,
    InstanceEnded,
    InstanceErrored,
    InstanceNotFound,
    InstanceTerminated,
    OwnerAway,
    ResultTimeout,
    StepNotFound,
    UsageError,
)
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import resolve_options
from toque.workflow import Retention, Workflow, params_type, result_type, workflow_name

if TYPE_CHECKING:
    from toque.storage.ports import Bus, Randomness

__all__ = ["BatchResult", "Client", "DeleteResult", "Instance", "InstanceStatus", "NewInstance", "Page",
           "QueueReport", "StationQueue", "StationReport", "StepRef", "TlsFiles", "WorkflowReport"]

TIMEOUT_DEFAULT: Final = "10 seconds"
BATCH_TIMEOUT_DEFAULT: Final = "30 seconds"
HELD_S_MIN: Final = 1.0  # an owner that held a `wait` back so long is asked again at once
ENDED: Final = frozenset({"complete", "errored", "terminated"})

P = TypeVar("P")
R = TypeVar("R")

_decode_instance = msgspec.msgpack.Decoder(InstanceView).decode
_decode_description = msgspec.msgpack.Decoder(DescribeView).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files for a TLS connection; None = the system's authorities, and no certificate of our own."""

    ca: Path | str | None = None
    cert: Path | str | None = None
    key: Path | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStatus:
    """An instance as its owner saw it. Times are UTC, of the broker's clock; None = not yet."""

    workflow: str
    id: str
    status: str
    """queued, running, waiting, waitingForPause, paused, complete, errored or terminated."""
    run: int
    created_at: datetime | None
    admitted_at: datetime | None
    ended_at: datetime | None
    wake_at: datetime | None
    """When the soonest timer of a waiting instance is due."""
    output: Any
    """Decoded; None unless complete, and in lists."""
    progress: Any
    """What it reported last: not kept, so None after a take-over, at rest, after the end; and in lists."""
    error: ErrorView | None
    """Why it errored; None otherwise, and in lists."""
    blocked_on: str
    """Why it does not run though it could: it waits for a `slot`, or is held (docs/states.md); else empty."""
    station: str
    pod: str
    awaits: tuple[str, ...] = ()
    """Types of the events that it waits for."""
    buffered: int = 0
    """Events that came and that no wait has taken."""

    @property
    def ended(self) -> bool:
        """Whether this status is final."""
        return self.status in ENDED


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a list. `cursor` goes on behind it; None = this was the last one. The last one may be empty."""

    rows: list[InstanceStatus]
    cursor: str | None


class Client:
    """A connection to one account. Make one with `await Client.connect(…)`, and close it.

    Safe to share between the tasks of one loop, not between threads: see `SyncClient`. A call that finds no answer goes
    on trying until its time-out and then raises an Unavailable error that says what is known and carries the handle.
    """

    def __init__(self, bus: Bus, *, account: str = "main", owns_bus: bool = False, inbox_prefix: str = "_INBOX",
                 rng: Randomness | None = None, now_ms: Callable[[], int] | None = None) -> None:
        self._bus = bus
        self._owns_bus = owns_bus
        self._account = check_account(account)
        self._rng = rng or random.SystemRandom()
        self._asker = StationAsker(bus, account, self._rng)
        self._creator = Creator(bus, account, self._asker, self._rng, now_ms or _wall_clock_ms)
        self._lists = Lists(account, self._asker)
        self._reports = Reports(bus, account, self._asker, self._rng, inbox_prefix)
        self.accounts = Accounts(bus)
        self.dead = DeadMessages(bus, account, self._creator, self._asker, self._rng)

    @classmethod
    def connect(cls, url: str | None = None, *, account: str = "main", credentials: Path | str | None = None,
                tls: TlsFiles | None = None, context: str | None = None,
                name: str = "toque-client") -> Connecting:
        """Connect: `client = await Client.connect()` or `async with Client.connect() as client`.

        Without a `url`: NATS_URL, else a running `toque dev` in this directory or above, else the selected NATS
        context, else nats://127.0.0.1:4222. `credentials` is a .creds file, `context` the name of a NATS context.
        Raises SetupError (a file that cannot be read, a login that is refused), BrokerUnavailable.
        """

        async def connecting() -> Client:
            check_account(account)
            files = tls or TlsFiles()
            options = resolve_options(url, context=context, credentials=credentials, tls_ca=files.ca,
                                      tls_cert=files.cert, tls_key=files.key)
            options = replace(options, name=name)
            bus = await NatsBus.connect(options)
            return cls(bus, account=account, owns_bus=True, inbox_prefix=options.inbox_prefix)

        return Connecting(connecting)

    @property
    def account(self) -> str:
        """The account that it works in."""
        return self._account

    async def close(self) -> None:
        """Close the connection. Instances go on; calls under way end with BrokerUnavailable."""
        if self._owns_bus:
            await self._bus.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await self.close()

    # -- creating -------------------------------------------------------------------------------------------------

    @overload
    async def create(self, workflow: type[Workflow[None, R]], params: None = None, *, id: str | None = None,
                     retention: Retention | None = None, timeout: Duration = TIMEOUT_DEFAULT) -> Instance[R]: ...

    @overload
    async def create(self, workflow: type[Workflow[P, R]], params: P, *, id: str | None = None,
                     retention: Retention | None = None, timeout: Duration = TIMEOUT_DEFAULT) -> Instance[R]: ...

    @overload
    async def create(self, workflow: str, params: Any = None, *, id: str | None = None,
                     retention: Retention | None = None, timeout: Duration = TIMEOUT_DEFAULT) -> Instance[Any]: ...

    async def create(self, workflow: Any, params: Any = None, *, id: str | None = None,
                     retention: Retention | None = None, timeout: Duration = TIMEOUT_DEFAULT) -> Instance[Any]:
        """Create an instance; without an `id` a new one is made. When it returns, the creation is stored for good.

        `retention` says how long it is kept after its end, instead of what its workflow says.
        Raises, with nothing stored: InvalidName, InvalidPayload, PayloadTooLarge; UnknownWorkflow (no pod has ever
        served it here); InstanceExists; QueueFull. BrokerUnavailable says whether it was stored, refused or unknown:
        create again with the same id to be sure. OwnerAway: with an `id` of your own, the creation is stored, but no
        owner could say whether the id existed before. Both carry the handle.
        A client that is killed meanwhile leaves either the whole creation or none.
        """
        name, params_type_, _ = workflow_types(workflow)
        creation = self._creator.make(name, params, params_type_, id, self._creator.new_headers(), retention)
        handle = self.handle(workflow, creation.id)
        deadline = Deadline(_seconds(timeout))
        try:
            await self._creator.publish(creation, deadline)
        except (BrokerUnavailable, OwnerAway) as error:
            error.handle = handle
            raise
        return handle

    async def create_batch(self, workflow: type[Workflow[P, Any]] | str, items: Iterable[NewInstance], *,
                           timeout: Duration = BATCH_TIMEOUT_DEFAULT) -> builtins.list[BatchResult]:
        """Create many instances fast. One result per item, in order, each true for itself (`error` None = created).

        Items are stored in atomic batches of up to 1,000; `timeout` bounds the attempts for each of them. Errors of
        items are those of `create`; the second of two items with one id gets TwiceInBatch. Ids of your own cost a
        question to their owner each. A client that is killed meanwhile leaves any number of the items created.
        Raises UnknownWorkflow when no pod has ever served the workflow here.
        """
        name, params_type_, _ = workflow_types(workflow)
        batch = BatchCreator(self._creator, self._bus, name, params_type_, _seconds(timeout))
        results = await batch.run(items if isinstance(items, Sequence) else builtins.list(items))
        for result in results:
            if isinstance(result.error, (BrokerUnavailable, OwnerAway)):
                result.error.handle = self.handle(workflow, result.id)
        return results

    async def delete_batch(self, workflow: type[Workflow[Any, Any]] | str, ids: Iterable[str], *,
                           timeout: Duration = BATCH_TIMEOUT_DEFAULT) -> builtins.list[DeleteResult]:
        """Delete instances, as many as there are, whatever their status: see `Instance.delete`.

        One result per id, in order, each true for itself (`error` None = gone). An id that stands there twice is deleted
        once, and both have its result. Errors are InstanceNotFound, InvalidName, OwnerAway (whether it is gone is not
        known; call it again, that is harmless). `timeout` is for each. A client that is killed meanwhile leaves any
        number of them deleted. Raises UsageError for what is no list of ids: nothing is deleted.
        """
        taken, name = checked_ids(ids), workflow_types(workflow)[0]
        return await delete_each(taken, lambda instance_id: self.handle(name, instance_id).delete(timeout=timeout))

    # -- one instance ---------------------------------------------------------------------------------------------

    @overload
    def handle(self, workflow: type[Workflow[Any, R]], id: str) -> Instance[R]: ...

    @overload
    def handle(self, workflow: str, id: str) -> Instance[Any]: ...

    def handle(self, workflow: Any, id: str) -> Instance[Any]:
        """A handle of an instance, without asking whether it exists. Raises InvalidName."""
        name, _, result_type_ = workflow_types(workflow)
        return Instance(self, name, check_instance_id(id), result_type_)

    @overload
    async def get(self, workflow: type[Workflow[Any, R]], id: str, *,
                  timeout: Duration = TIMEOUT_DEFAULT) -> Instance[R]: ...

    @overload
    async def get(self, workflow: str, id: str, *, timeout: Duration = TIMEOUT_DEFAULT) -> Instance[Any]: ...

    async def get(self, workflow: Any, id: str, *, timeout: Duration = TIMEOUT_DEFAULT) -> Instance[Any]:
        """A handle of an instance that exists. Raises InvalidName, InstanceNotFound (its owner says so), OwnerAway."""
        handle = self.handle(workflow, id)
        await handle.status(timeout=timeout)
        return handle

    async def list(self, workflow: type[Workflow[Any, Any]] | str | None = None, *, limit: int | None = None,
                   page_size: int = PAGE_ROWS_DEFAULT, timeout: Duration = TIMEOUT_DEFAULT,
                   **filters: Unpack[ListFilters]) -> AsyncGenerator[InstanceStatus, None]:
        """Admitted instances, oldest first: `async for row in client.list("census", status="running")`.

        Rows are read in pages while you iterate: one that changes meanwhile may show either state, is never given
        twice, and may be left out if its status is filtered; one that does not change is always there. Queued ones are
        not listed. `timeout` is for each answer of a station. Raises UsageError, InvalidName, OwnerAway.
        """
        request = list_request(_name(workflow), filters)
        async for view in self._lists.rows(request, limit, page_size, _seconds(timeout)):
            yield _status(view, Any)

    def subscribe(self, instances: Iterable[Instance[Any]], *, cursors: Mapping[tuple[str, str], str] | None = None,
                  filter: Collection[str] | None = None,
                  timeout: Duration | None = None) -> AsyncGenerator[WatchEvent, None]:
        """The events of many instances in one: `async for event in client.subscribe(handles)`. At most 1,000 of them.

        Of each instance as `Instance.watch`, in order and without gap or repeat; between two of them in no order. Ends
        when all have ended. `cursors` holds the last cursor of an instance by its (workflow, id).
        """
        return subscribe(instances, cursors or {}, filter, timeout)

    async def list_page(self, workflow: type[Workflow[Any, Any]] | str | None = None, *, cursor: str | None = None,
                        limit: int = PAGE_ROWS_DEFAULT, timeout: Duration = TIMEOUT_DEFAULT,
                        **filters: Unpack[ListFilters]) -> Page:
        """One page of such a list, at most `limit` (to 1,000) rows, and the cursor of the next.

        A cursor is text, safe in a URL; it carries its filters, which may be left out with it. It holds for ever, whoever
        owns the stations, and in the same order gives what `list` would. Raises as `list`.
        """
        request = list_request(_name(workflow), filters)
        rows, following = await self._lists.page(request, cursor or "", limit, _seconds(timeout))
        return Page([_status(view, Any) for view in rows], following)

    # -- the account ----------------------------------------------------------------------------------------------

    async def pods(self, *, count_tasks: bool = False) -> builtins.list[PodView]:
        """The pods that answer now, by name. Raises SetupError (no such account), BrokerUnavailable.

        `count_tasks` also counts each pod's asyncio tasks, which takes its loop some 10 ms at 50,000 tasks.
        """
        return await self._reports.pods(count_tasks=count_tasks)

    async def stations(self) -> builtins.list[StationReport]:
        """Every station with its owner's view, or why there is none. Raises SetupError, BrokerUnavailable."""
        return await self._reports.stations()

    async def queues(self, *, count_stations: bool = False) -> builtins.list[QueueReport]:
        """Every workflow's queue: depth, limit, age, and per station the owner's position.

        `count_stations` also counts what is queued per station, which takes a while on a deep queue.
        Raises SetupError, BrokerUnavailable.
        """
        return await self._reports.queues(count_stations=count_stations)

    async def workflows(self) -> builtins.list[WorkflowReport]:
        """Every workflow ever served here, and by which live pods now. Raises SetupError, BrokerUnavailable."""
        return await self._reports.workflows()

    def _encode_payload(self, payload: Any) -> bytes:
        return _payload.encode(payload, what="the event's payload", limit=_payload.payload_max(self._bus.max_payload))

    async def counts(self, workflow: type[Workflow[Any, Any]] | str | None = None, *,
                     timeout: Duration = TIMEOUT_DEFAULT) -> dict[str, dict[str, int]]:
        """How many instances there are: by workflow, then by status, queued ones too.

        Each station's part is exact as of its answer; a creation that is admitted during the call may be counted as
        queued too, or not yet. Raises InvalidName, SetupError, OwnerAway, BrokerUnavailable.
        """
        return await self._reports.counts(_name(workflow), _seconds(timeout))

    def _request_id(self) -> str:
        """Of one operation, and every repeat of it."""
        return f"{self._rng.getrandbits(64):016x}"

    async def _ask(self, handle: Instance[Any], operation: str, request: InstanceRequest,
                   deadline: Deadline) -> Answer | Silence:
        answer = await self._asker.about(operation, request, deadline)
        if isinstance(answer, Answer) and answer.code == "not_found":
            raise InstanceNotFound(f"there is no instance {handle}")
        if isinstance(answer, Answer) and answer.code == "refused":
            if isinstance(request, EventRequest):
                raise EventRefused(f"an event for {handle} was refused: {answer.message}")
            raise UsageError(f"{operation} of {handle} was refused: {answer.message}")
        return answer


@dataclass(frozen=True, slots=True)
class StepRef:
    """A step of an instance's history: its name, and which of that name and kind it is, from 1."""

    name: str
    count: int = 1
    kind: Literal["do", "sleep", "event", "start", "child"] = "do"


class Instance(Generic[R]):
    """A handle of one instance: a name to ask its owner by, which may be kept, and made anew anywhere.

    Its calls raise InstanceNotFound only when an owner says so; when none answers they raise OwnerAway.
    """

    __slots__ = ("_client", "id", "result_type", "workflow")

    def __init__(self, client: Client, workflow: str, id: str, result_type: Any = Any) -> None:
        self._client = client
        self.result_type = result_type
        self.workflow = workflow
        self.id = id

    def __str__(self) -> str:
        return f"{self.workflow}/{self.id}"

    def __repr__(self) -> str:
        return f"Instance({self.workflow!r}, {self.id!r})"

    async def status(self, *, timeout: Duration = TIMEOUT_DEFAULT) -> InstanceStatus:
        """How it stands. Raises InstanceNotFound, OwnerAway, InvalidPayload (an output that is not of the type)."""
        answer = await self._ask("status", timeout)
        return _status(_decode_instance(answer.value), self.result_type)

    async def describe(self, *, timeout: Duration = TIMEOUT_DEFAULT) -> DescribeView:
        """The instance with its params and the steps recorded so far; payloads in it are raw msgpack.

        Raises InstanceNotFound, OwnerAway.
        """
        answer = await self._ask("describe", timeout)
        return _decode_description(answer.value)

    def watch(self, cursor: str | None = None, *, filter: Collection[str] | None = None,
              timeout: Duration | None = None) -> AsyncGenerator[WatchEvent, None]:
        """Its events, kept ones first and then live: `async for event in handle.watch()`, until it has ended.

        With the `cursor` of an event: those behind it. `filter` names the types wanted; the end ends it all the same.
        In order, without gap or repeat, over crashes and take-overs too; an event is told when its record is accepted,
        so what began (a step, an attempt) is told when it has its first record. A restart from the start drops the
        events of the run before that are not read yet. `timeout` bounds the time without any owner; None waits for ever.
        Raises InstanceNotFound (deleted, too, or the cursor is of another one), OwnerAway, TooManyWatchers, UsageError.
        """
        return watch(self, cursor, filter, timeout)

    async def terminate(self, *, children: bool = False, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """End it without a result; a queued one never starts. When this returns it is recorded, and final.

        With `children` so end the children of its present run, and theirs: a moment later, and whatever dies meanwhile,
        for it is recorded with its own end.
        Raises InstanceEnded (it had ended before), InstanceNotFound, OwnerAway (whether it was done is not known: call
        it again, that is harmless).
        """
        await self._ask("terminate", timeout, TerminateRequest(
            workflow=self.workflow, id=self.id, request=self._client._request_id(), children=children))

    async def send_event(self, type: str, payload: Any = None, *, event_id: str | None = None,
                         timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Send an event: `step.wait_for_event(name, type)` in its run() gets the payload, now or later, exactly once.

        A queued instance takes events too. When this returns the event is recorded, and survives whatever dies then.
        Raises InvalidName, InvalidPayload, PayloadTooLarge; InstanceEnded, InstanceNotFound; EventRefused (10,000 events
        are there that it has not waited for); OwnerAway: whether it was kept is not known; send it again with the
        `event_id` that you gave, and it is kept once.
        """
        check_event_type(type)
        data = self._client._encode_payload(payload)
        request = EventRequest(workflow=self.workflow, id=self.id, request=event_id or self._client._request_id(),
                               type=type, payload=msgspec.Raw(data))
        await self._ask("event", timeout, request)

    async def approve(self, name: str, *, by: str, comment: str = "", timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Approve what `step.wait_for_approval(name)` waits for. `by`: who does. Raises as `send_event`."""
        await self._decide(name, ApprovalPayload(True, by, comment), timeout)

    async def reject(self, name: str, *, by: str, comment: str = "", timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Reject what `step.wait_for_approval(name)` waits for. `by`: who does. Raises as `send_event`."""
        await self._decide(name, ApprovalPayload(False, by, comment), timeout)

    async def _decide(self, name: str, decision: ApprovalPayload, timeout: Duration) -> None:
        if not decision.by:
            raise UsageError(f"an approval says who decided: by={decision.by!r} does not")
        await self.send_event(approval_type(name), decision, timeout=timeout)

    async def pause(self, *, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Let callbacks that are inside finish, enter nothing more, and stand still until `resume`.

        When this returns it is recorded. Status is `waitingForPause` while a callback is still inside, then `paused`;
        timers stand still, events are kept. A paused instance stays so. Raises as `terminate`.
        """
        await self._ask("pause", timeout)

    async def resume(self, *, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Go on after a pause: open timers are moved by its length. No effect on one that is not paused.

        Raises as `terminate`.
        """
        await self._ask("resume", timeout)

    async def restart(self, *, from_: StepRef | None = None, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Begin another run of it, with the same params: from the start, or from a step of its history.

        Works in every status; what runs is cut. With `from_` the results of the steps that began before that step are
        kept. Events that no kept step got are gone. A queued one is left as it is. When this returns it is recorded.
        Raises StepNotFound, InstanceNotFound, OwnerAway.
        """
        ref = from_ or StepRef("")
        request = RestartRequest(workflow=self.workflow, id=self.id, request=self._client._request_id(),
                                 from_name=ref.name, from_count=ref.count, from_kind=ref.kind)
        answer = await self._ask("restart", timeout, request)
        if answer.code == "no_step":
            raise StepNotFound(answer.message)

    async def delete(self, *, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Forget it, whatever its status: nothing of it goes on, and the id is free. A queued one never starts.

        When this returns it is gone. Raises InstanceNotFound, OwnerAway (call it again, that is harmless).
        """
        await self._ask("delete", timeout)

    async def _ask(self, operation: str, timeout: Duration, request: InstanceRequest | None = None) -> Answer:
        client = self._client
        if request is None:
            request = InstanceRequest(workflow=self.workflow, id=self.id, request=client._request_id())
        answer = await client._ask(self, operation, request, Deadline(_seconds(timeout)))
        if isinstance(answer, Silence):
            raise OwnerAway(f"{operation} of {self} found no answer: {answer.reason}", handle=self)
        if answer.code == "ended":
            raise InstanceEnded(f"{self} has ended already{_in_brackets(answer.message)}")
        return answer

    async def result(self, timeout: Duration | None = None) -> R:
        """Wait for its end and return its output, decoded to the workflow's Result type.

        Raises InstanceErrored, InstanceTerminated; InstanceNotFound; InvalidPayload (an output that is not of the
        type); and, after the time-out (None waits for ever), ResultTimeout when it has not ended, OwnerAway when no
        owner answers. It goes on meanwhile, so you may ask again at any time.
        """
        view = await self._wait(None if timeout is None else _seconds(timeout))
        if view.status == "errored":
            error = view.error or ErrorView(type="Error")
            raise InstanceErrored(error.type, error.message, error.traceback)
        if view.status == "terminated":
            raise InstanceTerminated(f"{self} was terminated")
        output: R = _output(view, self.result_type)
        return output

    async def _wait(self, timeout_s: float | None) -> InstanceView:
        deadline = Deadline(timeout_s)
        request = InstanceRequest(workflow=self.workflow, id=self.id)
        pauses = Pauses(self._client._rng)
        loop = asyncio.get_running_loop()
        while True:
            asked_at = loop.time()
            answer = await self._client._ask(self, "wait", request, deadline)
            if isinstance(answer, Silence):
                raise OwnerAway(f"whether {self} has ended is not known: {answer.reason}", handle=self)
            view = _decode_instance(answer.value)
            if view.status in ENDED:
                return view
            if deadline.passed:
                raise ResultTimeout(f"{self} is {view.status} and has not ended within "
                                    f"{format_ms(round((timeout_s or 0) * 1000))}; it goes on", handle=self)
            if loop.time() - asked_at < HELD_S_MIN:  # not held back: a leaving owner, say
                await pauses.wait(deadline)


class Connecting(Opening[Client]):
    """A connection to be made: await it, or enter it with `async with`."""


# -- workflows and views -----------------------------------------------------------------------------------------------

def workflow_types(workflow: Any) -> tuple[str, Any, Any]:
    """Name, Params type and Result type; a workflow known by name only takes and gives anything."""
    if isinstance(workflow, str):
        return check_workflow(workflow), Any, Any
    if isinstance(workflow, type) and issubclass(workflow, Workflow):
        return workflow_name(workflow), params_type(workflow), result_type(workflow)
    raise UsageError(f"a workflow is named by its class or its name, not by {workflow!r:.80}")


def _name(workflow: Any) -> str:
    """Of a workflow that may be left out."""
    return "" if workflow is None else workflow_types(workflow)[0]


def _status(view: InstanceView, result_type: Any) -> InstanceStatus:
    return InstanceStatus(
        workflow=view.workflow, id=view.id, status=view.status, run=view.run,
        created_at=_time(view.created_at), admitted_at=_time(view.admitted_at), ended_at=_time(view.ended_at),
        wake_at=_time(view.wake_at), output=_output(view, result_type),
        progress=msgspec.msgpack.decode(view.progress) if view.progress else None,
        error=view.error, blocked_on=view.blocked_on,
        station=view.station, pod=view.pod, awaits=tuple(view.awaits), buffered=view.buffered)


def _output(view: InstanceView, result_type: Any) -> Any:
    if view.status != "complete" or not view.output:
        return None
    return _payload.decode(bytes(view.output), result_type, what=f"the output of {view.workflow}/{view.id}")


def _time(ms: int) -> datetime | None:
    return datetime.fromtimestamp(ms / 1000, UTC) if ms else None


def _seconds(timeout: Duration) -> float:
    return to_ms(timeout, what="timeout") / 1000


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000
