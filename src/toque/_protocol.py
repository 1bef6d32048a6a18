"""The requests and answers between clients and pods. JSON or msgpack: an answer comes in the encoding of its request.

Times are milliseconds of broker time since the epoch; 0 means "not yet".
"""

from __future__ import annotations

from typing import Any

import msgspec

LONG_POLL_S_MAX = 5.0


class ErrorView(msgspec.Struct, omit_defaults=True):
    """A recorded failure."""

    type: str
    message: str = ""
    traceback: str = ""


class InstanceRequest(msgspec.Struct, omit_defaults=True):
    """Of `status`, `describe`, `wait`, `exists`, `terminate`, `pause`, `resume` and `delete`."""

    workflow: str
    id: str
    request: str = ""  # the caller's own id of this operation, the same in every repeat (protocol rule 22)
    wait_s: float = 0.0  # `wait`: how long the owner may hold the answer back, at most LONG_POLL_S_MAX
    nonce: str = ""  # `exists`: the creation's own nonce


class EventRequest(InstanceRequest, omit_defaults=True):
    """Of `event`. `request` is the event's id: a repeat with the same one gets the first answer and changes nothing."""

    type: str = ""
    payload: msgspec.Raw = msgspec.Raw(b"")  # any value, in the request's encoding; nothing at all = null


class ApprovalPayload(msgspec.Struct):
    """The payload of an event that answers `step.wait_for_approval`."""

    approved: bool
    by: str = ""
    comment: str = ""


class TerminateRequest(InstanceRequest, omit_defaults=True):
    """Of `terminate`. With a `nonce`: only the instance of that creation."""

    children: bool = False  # its running children, too, and theirs


class ChildEndRequest(InstanceRequest, omit_defaults=True):
    """Of `child_end`, from the owner of the child to that of its parent: `workflow` and `id` are the parent's."""

    run: int = 0  # of the parent
    step: str = ""
    occurrence: int = 1
    child_run: int = 1
    status: str = ""
    output: bytes = b""  # msgpack, of a complete one
    error: ErrorView | None = None


class RestartRequest(InstanceRequest, omit_defaults=True):
    """Of `restart`: from the start, or from the step of this kind and name that is the so-manieth of them, from 1."""

    from_name: str = ""
    from_count: int = 1
    from_kind: str = "do"  # do | sleep | event | start | child


class ListRequest(msgspec.Struct, omit_defaults=True):
    """Of `list`: one page of one station, in order of admission. Bounds of time: `…_after` ≤ time < `…_before`; 0 = none."""

    workflow: str = ""
    status: str | list[str] = ""  # one, or several; "" = any
    after: int = 0  # `next` of the page before, or the serial of its last row that is wanted; 0 = from the start
    limit: int = 100
    newest: bool = False  # the newest first
    id_prefix: str = ""
    created_after: int = 0
    created_before: int = 0
    ended_after: int = 0
    ended_before: int = 0


class CountsRequest(msgspec.Struct, omit_defaults=True):
    """Of `counts`: of one workflow, or of all."""

    workflow: str = ""


class InstanceView(msgspec.Struct, omit_defaults=True):
    """An instance as its owner sees it."""

    workflow: str
    id: str
    status: str
    run: int = 1
    created_at: int = 0
    admitted_at: int = 0
    ended_at: int = 0
    wake_at: int = 0
    station: str = ""
    pod: str = ""
    blocked_on: str = ""
    output: msgspec.Raw = msgspec.Raw(b"")  # in the answer's encoding; empty unless complete
    progress: msgspec.Raw = msgspec.Raw(b"")  # the newest report, likewise; empty without one, and not in lists
    error: ErrorView | None = None
    awaits: list[str] = []  # types of the events that it waits for
    buffered: int = 0  # events that no wait has taken
    parent: str = ""  # of a child: "<workflow>/<id>" of the instance that made it


class StepView(msgspec.Struct, omit_defaults=True):
    """A step as recorded: running steps without a record are not in the list."""

    kind: str
    name: str
    occurrence: int
    status: str  # complete | failed | retrying | sleeping | starting | waiting | timed_out | cancelled
    attempts: int = 0
    started_at: int = 0
    ended_at: int = 0
    due: int = 0
    error: ErrorView | None = None
    output: msgspec.Raw = msgspec.Raw(b"")
    event: str = ""  # the type of the event that it waits for, or got
    child: str = ""  # the child that it creates: "<workflow>/<id>"


class DescribeView(msgspec.Struct, omit_defaults=True):
    """`describe`: the instance, its params and its steps in the order they were recorded."""

    instance: InstanceView
    steps: list[StepView]
    params: msgspec.Raw = msgspec.Raw(b"")
    interruptions: int = 0


class WatchRequest(InstanceRequest, omit_defaults=True):
    """Of `watch`: the events behind a cursor, or the next ones. `request` is the same for all pages of one watcher."""

    cursor: str = ""  # of the last event that was dealt with; "" = from the first one kept
    types: list[str] = []  # only events of these types; [] = of all
    progress: str = ""  # the report that was told last


WATCH_TYPES = (
    "workflow_queued", "workflow_started", "workflow_running", "workflow_waiting", "workflow_waiting_for_pause",
    "workflow_paused", "workflow_blocked", "workflow_interrupted", "workflow_completed", "workflow_errored",
    "workflow_terminated", "step_started", "step_completed", "step_errored", "step_cancelled", "attempt_started",
    "attempt_completed", "attempt_errored", "sleep_started", "sleep_completed", "wait_started", "wait_completed",
    "wait_timed_out", "progress",
)


class WatchView(msgspec.Struct, omit_defaults=True):
    """One event of an instance; fields that its type does not have are left out."""

    type: str  # one of WATCH_TYPES
    at: int
    cursor: str = ""
    run: int = 1
    kind: str = ""  # do | sleep | event | start | child
    step: str = ""
    count: int = 0  # which step of this kind and name
    attempt: int = 0
    event_type: str = ""  # that a wait is for
    duration_ms: int = 0  # of a sleep, or until a wait times out
    retry_delay_ms: int | None = None  # until the next attempt; None = there is none
    reason: str = ""  # workflow_blocked
    error: ErrorView | None = None
    value: msgspec.Raw = msgspec.Raw(b"")  # params or output, in the answer's encoding


class WatchPage(msgspec.Struct, omit_defaults=True):
    """`watch`: events in order, the cursor to go on from, and whether the instance has ended and all of it is told."""

    events: list[WatchView]
    cursor: str = ""
    ended: bool = False
    progress: WatchView | None = None  # the newest report, when it was not told yet; it is not kept, and has no cursor
    reported: str = ""  # which report that is


class ListPage(msgspec.Struct, omit_defaults=True):
    """`list`: rows and the `after` of the next page (0 = this was the last). One without rows may have a next one."""

    rows: list[InstanceView]
    next: int = 0
    serials: list[int] = []  # of the rows: each is the `after` of a page that begins behind it


class CountsView(msgspec.Struct, omit_defaults=True):
    """`counts` of a station: everything that its owner has accepted."""

    instances: dict[str, dict[str, int]]  # by workflow and status
    purgeable: dict[str, int] = {}  # by workflow: messages that still lie in the queue, and are no longer queued


class QueueView(msgspec.Struct, omit_defaults=True):
    """One workflow's queue at one station, as its owner sees it."""

    workflow: str
    committed: int  # queue sequence up to which all is admitted, dropped or parked
    prefetched: int = 0  # pulled, not admitted yet
    counts: dict[str, int] = {}  # instances per status
    purgeable: int = 0  # messages at or below `committed` that still lie in the stream: no longer queued


class SnapshotView(msgspec.Struct, omit_defaults=True):
    """A counting snapshot of a station."""

    name: str  # epoch and sequence of its position
    group: int
    sequence: int
    size_bytes: int
    rows: int
    taken_at: int


class RestoredView(msgspec.Struct, omit_defaults=True):
    """How the owner came by the station's state when it claimed it."""

    source: str  # local | snapshot | journal
    snapshot: str = ""  # its name
    rows: int = 0  # of the snapshot
    groups: int = 0  # read from the journal
    ms: int = 0  # from the claim to serving


class StationView(msgspec.Struct, omit_defaults=True):
    """`report` of a station."""

    station: str
    pod: str
    session: str
    epoch: int
    group: int
    instances: int  # live
    in_memory: int
    sequence: int  # of the station's last journal message
    restored_ms: int = 0
    queues: list[QueueView] = []
    journal_groups: int = 0  # that the station needs of the journal: behind its second newest counting snapshot
    journal_bytes: int = 0  # that these take
    snapshots: list[SnapshotView] = []  # counting ones, oldest first
    restored: RestoredView | None = None


class PodsRequest(msgspec.Struct, omit_defaults=True):
    """`pods.report`."""

    tasks: bool = False  # count the asyncio tasks too: some 10 ms of the loop's time at 50,000


class PodView(msgspec.Struct, omit_defaults=True):
    """A pod's answer to `pods.report`."""

    pod: str
    session: str
    stations: list[str]
    slots_leased: int
    slots_in_use: int
    slots_wanted: int
    loop_lag_ms: float
    workflows: dict[str, str]  # name → version
    started_at: int = 0
    journal: str = "ok"  # "ok", or what is wrong with it
    loop_lag_worst_ms: float = 0.0  # of the last minute
    loop_blocked_by: str = ""  # what the loop was busy with then, if it was blocked
    threads_in_use: int = 0  # callbacks in threads, the abandoned ones too
    threads_abandoned: int = 0  # of those: their result will be refused, but a thread cannot be stopped
    threads_max: int = 0
    pid: int = 0
    host: str = ""
    memory_bytes: int = 0
    tasks: int = 0  # asyncio tasks of the pod's loop that are not done, where the request asked for them


class Answer(msgspec.Struct, omit_defaults=True):
    """What a station's owner answers. Clients ignore an epoch lower than the highest seen for the station."""

    epoch: int
    code: str = "ok"  # ok | retry | moved | not_found | exists | ended | no_step | busy | refused
    message: str = ""
    value: msgspec.Raw = msgspec.Raw(b"")


class LeaseRequest(msgspec.Struct, omit_defaults=True):
    """A session asks the Gatekeeper: `demand` slots for work it sees, `wanted` with some spare ones on top.

    `begun`: those of the demand that are in use, or that instances wait for which had begun: these come before new ones.
    `ceiling` is what the pod holds itself to now: never above what it was granted, and already lowered when it is less.
    """

    session: str
    number: int
    demand: int
    wanted: int
    ceiling: int
    begun: int = 0


class LeaseAnswer(msgspec.Struct, omit_defaults=True):
    """The absolute number of slots; `target` below `slots` asks the pod to lower its ceiling and report.

    `admit`: new instances are admitted only while fewer slots than this are in use.
    """

    epoch: int
    slots: int
    target: int
    admit: int
    code: str = "ok"  # ok | retry | unknown_session


class AccountRecord(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The account's record in the control bucket."""

    name: str
    format: int = 1
    max_concurrent: int = 50_000
    start_rate: float = 0.0  # instances per second; 0 = unlimited
    queue_limit: int = 2_000_000
    stations: int = 8
    ttl_s: float = 10.0
    replicas: int = 1
    tombstones_s: float = 86_400.0  # how long the id and nonce of a deleted instance are remembered


class Layout(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Generations of stations: the newest last."""

    format: int = 1
    generations: list[tuple[int, int]] = []  # (generation, number of stations)


class SessionRecord(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A session's key in the control bucket. `ended` is written once, by whoever ends it."""

    pod: str
    session: str
    started_at: int = 0
    ttl_s: float = 10.0
    workflows: dict[str, str] = {}
    stations: list[str] = []
    leaving: bool = False  # it hands its stations over and takes no more
    ended: str = ""  # "", or why: "left", "expired", "dead"
    ended_by: str = ""


class CreateItem(msgspec.Struct):
    """One creation of a batch, as the client holds it."""

    id: str
    nonce: str
    body: bytes


_json_encoder = msgspec.json.Encoder()
_msgpack_encoder = msgspec.msgpack.Encoder()


def is_json(body: bytes) -> bool:
    """Requests are objects, so JSON starts with a brace; an empty request is JSON too."""
    return not body or body[:1] in b"{ \n\r\t"


def wants_tasks(request: bytes) -> bool:
    """Whether a request of `pods.report` asks for the number of tasks. What else it holds is no reason not to answer."""
    decode = msgspec.json.decode if is_json(request) else msgspec.msgpack.decode
    try:
        return decode(request or b"{}", type=PodsRequest).tasks
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return False


def encode(value: Any, *, json: bool) -> bytes:
    return _json_encoder.encode(value) if json else _msgpack_encoder.encode(value)
