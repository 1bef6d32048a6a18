"""Accounts: their streams, their two records in the control bucket, and the queue stream of each workflow.

Everything here is made create-once and in an order in which a process killed between any two writes leaves nothing
that the next one cannot finish: control stream, account record, layout record, journal stream, snapshot stream, dead
stream. Records are written by compare-and-set and read from the stream's leader; whoever loses a race takes the winner's
record.
"""

from __future__ import annotations

import asyncio
import builtins
import math
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from toque import _subjects
from toque._names import check_account, check_workflow
from toque._protocol import AccountRecord, Layout, encode
from toque.errors import SetupError, Unavailable, UsageError
from toque.storage.ports import BusError, StreamConfig

if TYPE_CHECKING:
    from toque.storage.ports import Bus, Message, StreamInfo

FORMAT: Final = 1  # of the records and streams that this version writes
MARKER_TTL_S: Final = 3600  # how long the server keeps the marker of an expired control key
QUEUE_RESERVE: Final = 0.05  # of the queue limit: what owners have committed and not purged yet (protocol rule 11)
MESSAGE_BYTES_MAX: Final = 1024 * 1024 + 16 * 1024  # of a creation with its headers (protocol rule 17)
DEAD_AGE_S_MAX: Final = 30 * 24 * 3600
DEAD_BYTES_MAX: Final = 256 * 1024 * 1024  # the server reserves it, so it has to fit small disks
EVENTS_MAX: Final = 1_000_000  # events in the stream of an account
EVENTS_BYTES_MAX: Final = 256 * 1024 * 1024  # reserved like the above
CAS_ATTEMPTS_MAX: Final = 20
CAS_PAUSE_S: Final = 0.05
_NS_PER_S: Final = 1_000_000_000

_R = TypeVar("_R", AccountRecord, Layout)


class _Format(msgspec.Struct):
    """The only field that is read of a record whose format is not known yet."""

    format: int = 1


# -- streams -----------------------------------------------------------------------------------------------------------

def _metadata(account: str, role: str, workflow: str = "") -> dict[str, str]:
    marks = {"toque.account": account, "toque.role": role, "toque.format": str(FORMAT)}
    if workflow:
        marks["toque.workflow"] = workflow
    return marks


def control_config(account: AccountRecord) -> StreamConfig:
    """The control bucket: one message per key, the newest; keys may expire and leave a marker."""
    return StreamConfig(
        name=_subjects.control_stream(account.name), subjects=[f"toque.{account.name}.control.>"],
        description="Toque control bucket: account, layout, sessions", num_replicas=account.replicas,
        max_msgs_per_subject=1, allow_msg_ttl=True, subject_delete_marker_ttl=MARKER_TTL_S * _NS_PER_S,
        metadata=_metadata(account.name, "control"))


def journal_config(account: AccountRecord) -> StreamConfig:
    """The journal: nothing in it is ever discarded by the server (protocol rule 2)."""
    return StreamConfig(
        name=_subjects.journal_stream(account.name), subjects=[f"toque.{account.name}.journal.>"],
        description="Toque journal: the truth", num_replicas=account.replicas, discard="new",
        metadata=_metadata(account.name, "journal"))


def snapshot_config(account: AccountRecord) -> StreamConfig:
    """Snapshots of the stations' folded state, cut into chunks; they leave when newer ones count (protocol rule 5)."""
    return StreamConfig(
        name=_subjects.snapshot_stream(account.name), subjects=[f"toque.{account.name}.snapshot.>"],
        description="Toque snapshots: the stations' state at places of the journal", num_replicas=account.replicas,
        discard="new", metadata=_metadata(account.name, "snapshots"))


def event_config(account: AccountRecord, layout: Layout) -> StreamConfig:
    """Events that were published plainly, until their owners have committed or parked them."""
    generation, stations = layout.generations[-1]
    return StreamConfig(
        name=_subjects.event_stream(account.name), subjects=[_subjects.event(account.name, "*", "*", "*")],
        description="Toque: events on their way to instances", num_replicas=account.replicas, max_msgs=EVENTS_MAX,
        max_bytes=EVENTS_BYTES_MAX, max_msg_size=MESSAGE_BYTES_MAX, discard="new",
        subject_transform=_subjects.event_transform(account.name, generation, stations),
        metadata=_metadata(account.name, "events"))


def dead_config(account: AccountRecord) -> StreamConfig:
    """Parked messages, kept for a while for people to look at."""
    return StreamConfig(
        name=_subjects.dead_stream(account.name), subjects=[f"toque.{account.name}.dead.>"],
        description="Toque: what could not be accepted, and why", num_replicas=account.replicas,
        max_age=DEAD_AGE_S_MAX * _NS_PER_S, max_bytes=DEAD_BYTES_MAX, metadata=_metadata(account.name, "dead"))


def queue_capacity(queue_limit: int) -> int:
    """Messages that a queue stream takes: the limit, and a reserve for those committed and not purged yet."""
    return queue_limit + math.ceil(queue_limit * QUEUE_RESERVE)


def queue_config(account: AccountRecord, layout: Layout, workflow: str) -> StreamConfig:
    """A workflow's queue: a plain publish lands at its id's station, a second one of an id is refused."""
    generation, stations = layout.generations[-1]
    return StreamConfig(
        name=_subjects.queue_stream(account.name, workflow), subjects=[_subjects.create(account.name, workflow, "*")],
        description=f"Toque: queued instances of {workflow}", num_replicas=account.replicas,
        max_msgs=queue_capacity(account.queue_limit), max_msgs_per_subject=1, max_msg_size=MESSAGE_BYTES_MAX,
        discard="new", discard_new_per_subject=True, allow_atomic=True,
        subject_transform=_subjects.queue_transform(account.name, workflow, generation, stations),
        metadata=_metadata(account.name, "queue", workflow))


async def _ensure_stream(bus: Bus, config: StreamConfig) -> None:
    try:
        await bus.ensure_stream(config)
    except BusError as refusal:
        raise SetupError(f"the NATS server refuses the stream {config.name}: {refusal.description} ({refusal.code}). "
                         "Toque needs a server of version 2.12 or newer with JetStream, file storage left, and no "
                         "other stream on the subjects toque.>") from refusal


async def ensure_queue_stream(bus: Bus, account: AccountRecord, layout: Layout, workflow: str) -> None:
    """Make the queue stream of a workflow; one that exists is only brought to the account's present limit.

    Idempotent. What the account's record says now counts, not an older one in the caller's hands; the stream's
    transform is left as it is, since only a new generation changes that.
    Raises InvalidName, SetupError (the server refuses the stream), BrokerUnavailable.
    """
    check_workflow(workflow)
    await _ensure_stream(bus, queue_config(account, layout, workflow))
    name = _subjects.queue_stream(account.name, workflow)
    info = await bus.stream_info(name)
    if not _fits(info, account):
        await _fit_queue(bus, await read_account(bus, account.name), await read_layout(bus, account.name), workflow)


def _fits(info: StreamInfo, account: AccountRecord) -> bool:
    limit_fits = info.config.get("max_msgs") == queue_capacity(account.queue_limit)
    return limit_fits and info.config.get("num_replicas", 1) == account.replicas


async def _fit_queue(bus: Bus, account: AccountRecord, layout: Layout, workflow: str) -> None:
    """Bring an existing queue stream to the account's limits."""
    wanted = queue_config(account, layout, workflow)
    info = await bus.stream_info(wanted.name)
    if _fits(info, account):
        return
    transform = info.config.get("subject_transform")
    kept = wanted if transform is None else msgspec.structs.replace(wanted, subject_transform=dict(transform))
    await bus.update_stream(kept)


async def queue_workflows(bus: Bus, account: str) -> list[str]:
    """Names of the workflows that have a queue stream in the account, sorted."""
    prefix = _subjects.queue_stream(account, "")
    return sorted(name.removeprefix(prefix) for name in await bus.list_streams(prefix))


# -- records -----------------------------------------------------------------------------------------------------------

def _decode(message: Message, type_: type[_R]) -> _R:
    """Raises SetupError for a record of a newer format or one that is none."""
    try:
        found = msgspec.json.decode(message.data, type=_Format).format
        if found > FORMAT:
            raise SetupError(f"the record {message.subject} has format {found}; this version of Toque knows formats up "
                             f"to {FORMAT}: install the version that wrote it, or a newer one")
        return msgspec.json.decode(message.data, type=type_)
    except msgspec.MsgspecError as error:
        raise SetupError(f"the record {message.subject} cannot be read ({error}): something other than Toque "
                         "wrote it") from error


async def _find(bus: Bus, account: str, subject: str) -> Message | None:
    """The newest message of a control key from the leader; None also when there is no control bucket."""
    try:
        message = await bus.last_message(_subjects.control_stream(account), subject)
    except BusError as refusal:
        if refusal.code in (BusError.STREAM_NOT_FOUND, BusError.MESSAGE_NOT_FOUND):
            return None
        raise
    return message if message is not None and message.data else None


def no_account(name: str) -> SetupError:
    """What to say when a control bucket or a record is not there."""
    return SetupError(f"there is no account {name!r} on this NATS server: start a pod of it, or make it with "
                      f"`toque accounts create {name}`")


async def find_account(bus: Bus, name: str) -> AccountRecord | None:
    """The account's record, or None where there is no such account. Raises InvalidName, SetupError."""
    message = await _find(bus, check_account(name), _subjects.control_account(name))
    return None if message is None else _decode(message, AccountRecord)


async def read_account(bus: Bus, name: str) -> AccountRecord:
    """The account's record, from the leader.

    Raises SetupError when there is no such account or its format is newer, BrokerUnavailable.
    """
    account = await find_account(bus, name)
    if account is None:
        raise no_account(name)
    return account


async def read_layout(bus: Bus, name: str) -> Layout:
    """The account's layout, from the leader: at least one generation, the newest last.

    Raises SetupError when there is none or its format is newer, BrokerUnavailable.
    """
    message = await _find(bus, check_account(name), _subjects.control_layout(name))
    if message is None:
        raise no_account(name)
    layout = _decode(message, Layout)
    if not layout.generations:
        raise SetupError(f"the record {message.subject} names no stations")
    return layout


async def list_accounts(bus: Bus) -> list[AccountRecord]:
    """Every account on the server, by name. Raises SetupError for one of a newer format."""
    ending = _subjects.control_stream("").removeprefix("toque+")
    names = [stream.removeprefix("toque+").removesuffix(ending)
             for stream in await bus.list_streams("toque+") if stream.endswith(ending)]
    found = [await find_account(bus, name) for name in sorted(names)]
    return [account for account in found if account is not None]


async def _create_once(bus: Bus, account: str, subject: str, record: _R) -> _R:
    """Write a control record unless there is one; returns the one that stands."""
    for _ in range(CAS_ATTEMPTS_MAX):
        message = await _find(bus, account, subject)
        if message is not None:
            return _decode(message, type(record))
        if await _compare_and_set(bus, subject, record, 0):
            return record
    raise Unavailable(f"the record {subject} could not be written: others keep writing it; try again")


async def _compare_and_set(bus: Bus, subject: str, record: AccountRecord | Layout, expected: int) -> bool:
    """False = somebody else wrote first (or is just writing): read again."""
    headers = {_subjects.EXPECTED_LAST_HEADER: str(expected)}
    try:
        await bus.publish(subject, encode(record, json=True), headers)
    except BusError as refusal:
        if refusal.code not in (BusError.WRONG_LAST_SEQUENCE, BusError.IN_FLIGHT):
            raise
        await asyncio.sleep(CAS_PAUSE_S)
        return False
    return True


# -- the account as a whole --------------------------------------------------------------------------------------------

async def ensure_account(bus: Bus, name: str, *, defaults: AccountRecord | None = None) -> tuple[AccountRecord, Layout]:
    """Make what is missing of an account, and return its record and layout.

    `defaults` are the settings of an account that is not there yet (its `name` is ignored); one that is there keeps
    its own. Idempotent, may be killed anywhere and run by several at once: all get the same record and layout.
    Raises InvalidName, UsageError (settings out of bounds), SetupError (newer format; a server that refuses the
    streams), BrokerUnavailable (run it again).
    """
    check_account(name)
    wanted = check_settings(msgspec.structs.replace(defaults or AccountRecord(name=name), name=name, format=FORMAT))
    await _ensure_stream(bus, control_config(wanted))
    account = await _create_once(bus, name, _subjects.control_account(name), wanted)
    generations = [(_subjects.FIRST_GENERATION, account.stations)]
    layout = await _create_once(bus, name, _subjects.control_layout(name), Layout(generations=generations))
    await _ensure_stream(bus, journal_config(account))
    await _ensure_stream(bus, snapshot_config(account))
    await _ensure_stream(bus, event_config(account, layout))
    await _ensure_stream(bus, dead_config(account))
    if account.replicas != wanted.replicas:  # the control bucket may have been made with a loser's settings
        await _fit_replicas(bus, control_config(account))
    return account, layout


async def _fit_replicas(bus: Bus, config: StreamConfig) -> None:
    info = await bus.stream_info(config.name)
    if info.config.get("num_replicas", 1) != config.num_replicas:
        await bus.update_stream(config)


async def update_account(bus: Bus, name: str, /, **changes: Any) -> AccountRecord:
    """Change settings of an account: max_concurrent, start_rate, queue_limit, ttl_s, replicas,
    tombstones_s.

    The record first, by compare-and-set, then the streams; killed between the two, the same call again (or the next
    pod to start) brings the streams after it. Sessions that are open keep the TTL that they began with.
    Raises UsageError (an unknown or illegal setting; nothing was changed), SetupError, BrokerUnavailable.
    """
    subject = _subjects.control_account(check_account(name))
    for _ in range(CAS_ATTEMPTS_MAX):
        message = await _find(bus, name, subject)
        if message is None:
            raise no_account(name)
        before = _decode(message, AccountRecord)
        account = changed(before, changes)
        if account == before or await _compare_and_set(bus, subject, account, message.sequence):
            await _fit_streams(bus, account)
            return account
    raise Unavailable(f"the account {name!r} could not be changed: others keep changing it; try again")


async def _fit_streams(bus: Bus, account: AccountRecord) -> None:
    layout = await read_layout(bus, account.name)
    await _ensure_stream(bus, event_config(account, layout))  # an account of an older version has none
    for config in (control_config(account), journal_config(account), snapshot_config(account),
                   event_config(account, layout), dead_config(account)):
        await _fit_replicas(bus, config)
    for workflow in await queue_workflows(bus, account.name):
        await _fit_queue(bus, account, layout, workflow)


# -- settings ----------------------------------------------------------------------------------------------------------

_BOUNDS: Final[dict[str, tuple[type[int] | type[float], float, float]]] = {
    "max_concurrent": (int, 1, 10_000_000),
    "start_rate": (float, 0.0, 1_000_000.0),
    "queue_limit": (int, 1, 100_000_000),
    "stations": (int, 1, 256),
    "ttl_s": (float, 2.0, 3600.0),
    "replicas": (int, 1, 5),
    "tombstones_s": (float, 1.0, 30 * 86_400.0),
}


def check_settings(account: AccountRecord) -> AccountRecord:
    """The account itself. Raises UsageError that names the first setting out of bounds."""
    for setting in _BOUNDS:
        _check_setting(setting, getattr(account, setting))
    if account.replicas % 2 == 0:
        raise UsageError(f"replicas must be 1, 3 or 5, not {account.replicas}")
    return account


def _check_setting(setting: str, value: Any) -> None:
    type_, low, high = _BOUNDS[setting]
    legal_types = (int,) if type_ is int else (int, float)
    if not isinstance(value, legal_types) or isinstance(value, bool):
        raise UsageError(f"{setting} must be {'a whole number' if type_ is int else 'a number'}, not {value!r}")
    if not low <= value <= high:
        raise UsageError(f"{setting} must be between {low:,} and {high:,}, not {value:,}")


def changed(account: AccountRecord, changes: dict[str, Any]) -> AccountRecord:
    """The account with the changes. Raises UsageError for an unknown, fixed or illegal setting."""
    unknown = sorted(changes.keys() - _BOUNDS.keys())
    if unknown:
        raise UsageError(f"an account has no setting {unknown[0]!r}; there are {', '.join(_BOUNDS)}")
    if changes.get("stations", account.stations) != account.stations:
        raise UsageError(f"the account {account.name!r} has {account.stations} stations, fixed when it was made: "
                         "make another account for another number")
    for setting, value in changes.items():
        _check_setting(setting, value)
    return check_settings(msgspec.structs.replace(account, **changes))


class Accounts:
    """`client.accounts`: make, list, show and change accounts."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def create(self, name: str, /, **settings: Any) -> AccountRecord:
        """Make an account. The same call again is harmless, also after a crash in the middle of it.

        Raises UsageError when it is there with other settings, or for a setting out of bounds; SetupError,
        BrokerUnavailable.
        """
        wanted = changed(AccountRecord(name=check_account(name), stations=settings.get("stations", 8)), settings)
        account, _ = await ensure_account(self._bus, name, defaults=wanted)
        for setting, value in settings.items():
            if getattr(account, setting) != value:
                raise UsageError(f"the account {name!r} is there already with {setting} = {getattr(account, setting)}; "
                                 f"change it with `toque accounts set {name}`")
        return account

    async def list(self) -> builtins.list[AccountRecord]:
        """Every account on the server, by name."""
        return await list_accounts(self._bus)

    async def describe(self, name: str) -> AccountRecord:
        """The account's settings. Raises SetupError when there is no such account."""
        return await read_account(self._bus, name)

    async def set(self, name: str, /, **settings: Any) -> AccountRecord:
        """Change settings: see `update_account`."""
        return await update_account(self._bus, name, **settings)
