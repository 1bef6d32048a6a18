"""Folds accepted groups into table rows. Pure and idempotent: the folded state equals a replay of the journal.

Tables and keys (all begin with the station's 4 bytes; numbers are big-endian, so keys sort in their order):

    position            → Position               where the state stands in the journal
    rows      serial    → InstanceRow
    history   serial, run, first seq → records of one group of one instance, as a msgpack array
    ids       workflow, 0, id → serial
    live      serial    → (empty)                instances that have not ended
    timers    due, serial → (empty)              waiting instances, by when they wake
    leases    session   → LeaseRow
    queue     workflow  → committed position
    counts    workflow, 0, status → number of instances
    snapshots           → [SnapshotRow]          the newest counting ones, oldest first
    sizes               → bytes of the journal up to the position
    deletions due, serial → (empty)              ended instances, by when their retention is over
    tombs     workflow, 0, id → TombRow          deleted ones
    tomb_due  due, serial → workflow, 0, id      the same, by when they are forgotten
    serials             → the highest serial ever given
    states    workflow, 0, status, serial → (empty)   where instances stand that are not running, for lists
    states              → (empty)                all such instances are in it; states from before it lack that
    outbox    serial, errand → OutboxRow     what ended instances still have to tell others

The numbers of the tables are part of the snapshots' format: new ones are only ever added at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from toque._subjects import StationId
from toque.errors import ToqueError
from toque.storage import records as r
from toque.storage.family import Parent
from toque.storage.ports import StoredRow

POSITION, ROWS, HISTORY, IDS, LIVE, TIMERS, LEASES, QUEUE, COUNTS, SNAPSHOTS, SIZES = range(11)
DELETIONS, TOMBS, TOMB_DUE, SERIALS, STATES, OUTBOX = range(11, 17)
TABLES = ("position", "rows", "history", "ids", "live", "timers", "leases", "queue", "counts", "snapshots", "sizes",
          "deletions", "tombs", "tomb_due", "serials", "states", "outbox")
KEYS_PER_SCAN = 1000
TOMBS_PER_RECORD = 100  # so many old tombstones a deletion forgets at least
REQUESTS_KEPT = 16  # ids of control operations that an instance's row remembers
EVENTS_KEY = "+"  # no workflow's name: the position in the event stream stands in the table of queues under it
SNAPSHOTS_KEPT = 3  # counting ones, whose objects are kept
GROUP_OVERHEAD_BYTES = 160  # about: what a journal message takes beside its records

INTERRUPTED_TYPE = "toque.Interrupted"  # failure type of an attempt that was interrupted too often

_encode = msgspec.msgpack.Encoder().encode
_row_decoder = msgspec.msgpack.Decoder(r.InstanceRow)
_position_decoder = msgspec.msgpack.Decoder(r.Position)
_outbox_decoder = msgspec.msgpack.Decoder(r.OutboxRow)
_tomb_decoder = msgspec.msgpack.Decoder(r.TombRow)
_snapshots_decoder = msgspec.msgpack.Decoder(list[r.SnapshotRow])

Writes = tuple[dict[bytes, bytes | None], ...]  # per table: key → new value, or None to delete


class FoldError(ToqueError):
    """An accepted record does not follow from the state: a gap, or an instance that nobody admitted. Never go on."""


class Lookup(Protocol):
    """Reads the state as it was before the batch."""

    def get(self, table: int, key: bytes) -> bytes | None: ...

    def keys(self, table: int, prefix: bytes, start: bytes, limit: int) -> list[bytes]:
        """At most `limit` keys that begin with `prefix` and are not below `start`, in order; no value is read."""
        ...


def station_key(station: StationId) -> bytes:
    return station.generation.to_bytes(2, "big") + station.number.to_bytes(2, "big")


def serial_key(station: bytes, serial: int) -> bytes:
    return station + serial.to_bytes(8, "big")


def id_key(station: bytes, workflow: str, instance_id: str) -> bytes:
    return station + workflow.encode() + b"\0" + instance_id.encode()


def timer_key(station: bytes, due: int, serial: int) -> bytes:
    return station + due.to_bytes(8, "big") + serial.to_bytes(8, "big")


def tomb_key(station: bytes, workflow: str, instance_id: str) -> bytes:
    return id_key(station, workflow, instance_id)


def history_key(station: bytes, serial: int, run: int, seq: int) -> bytes:
    return serial_key(station, serial) + run.to_bytes(4, "big") + seq.to_bytes(4, "big")


def count_key(station: bytes, workflow: str, status: r.Status) -> bytes:
    return station + workflow.encode() + b"\0" + bytes((status,))


def state_key(station: bytes, workflow: str, status: r.Status, serial: bytes) -> bytes:
    return count_key(station, workflow, status) + serial


def outbox_key(station: bytes, serial: int, errand: r.Errand) -> bytes:
    return serial_key(station, serial) + bytes((errand,))


def step_key(kind: r.StepKind, name: str, occurrence: int) -> str:
    """The identity of a step within its run, as text."""
    return f"{int(kind)}:{occurrence}:{name}"


def decode_row(data: bytes) -> r.InstanceRow:
    return _row_decoder.decode(data)


def decode_outbox(data: bytes) -> r.OutboxRow:
    return _outbox_decoder.decode(data)


def decode_tomb(data: bytes) -> r.TombRow:
    return _tomb_decoder.decode(data)


def decode_position(data: bytes) -> r.Position:
    return _position_decoder.decode(data)


def decode_snapshots(data: bytes) -> list[r.SnapshotRow]:
    return _snapshots_decoder.decode(data)


class FoldBatch:
    """Collects the writes of several groups, to be stored in one transaction."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._rows: dict[bytes, r.InstanceRow] = {}
        self._history: dict[bytes, list[bytes]] = {}
        self._counts: dict[bytes, int] = {}
        self._sequences: dict[bytes, int] = {}
        self._sizes: dict[bytes, int] = {}
        self._serials: dict[bytes, int] = {}
        self.writes: Writes = tuple({} for _ in TABLES)

    def apply(self, group: r.Group) -> None:
        """Fold one group. A group at or below the state's position is skipped. Raises FoldError."""
        station = station_key(group.station)
        if group.position.sequence <= self._sequence(station):
            return
        if not self._sequences[station]:
            self.writes[STATES][station] = b""
        self._sequences[station] = group.position.sequence
        self.writes[POSITION][station] = _encode(group.position)
        self._sizes[station] = self._size(station) + sum(map(len, group.encoded)) + GROUP_OVERHEAD_BYTES
        tails: dict[int, list[bytes]] = {}  # of this group: serial → its records so far
        for record, encoded in zip(group.records, group.encoded, strict=True):
            if record.serial == 0:
                self._apply_station(station, record, group.position)
            elif self._apply_instance(station, record):
                tail = tails.get(record.serial)
                if tail is None or type(record) is r.Restarted:
                    tails[record.serial] = tail = []
                    self._history[history_key(station, record.serial, record.run, record.seq)] = tail
                tail.append(encoded)

    def finish(self) -> Writes:
        """Every write of the batch."""
        rows, history, counts = self.writes[ROWS], self.writes[HISTORY], self.writes[COUNTS]
        for key, row in self._rows.items():
            rows[key] = _encode(row)
        for key, encoded in self._history.items():
            history[key] = r.join_records(encoded)
        for station, serial in self._serials.items():
            self.writes[SERIALS][station] = serial.to_bytes(8, "big")
        for key, count in self._counts.items():
            counts[key] = count.to_bytes(8, "big")
        for station, size in self._sizes.items():
            self.writes[SIZES][station] = size.to_bytes(8, "big")
        return self.writes

    def _sequence(self, station: bytes) -> int:
        known = self._sequences.get(station)
        if known is None:
            data = self._lookup.get(POSITION, station)
            known = decode_position(data).sequence if data else 0
            self._sequences[station] = known
        return known

    def _size(self, station: bytes) -> int:
        known = self._sizes.get(station)
        if known is None:
            data = self._lookup.get(SIZES, station)
            known = int.from_bytes(data, "big") if data else 0
        return known

    def _row(self, key: bytes) -> r.InstanceRow | None:
        row = self._rows.get(key)
        if row is None:
            if key in self.writes[ROWS]:  # deleted in this batch
                return None
            data = self._lookup.get(ROWS, key)
            if data is None:
                return None
            row = self._rows[key] = decode_row(data)
        return row

    def _apply_station(self, station: bytes, record: r.Record, position: r.Position) -> None:
        match record:
            case r.Lease():
                lease = r.LeaseRow(record.number, record.slots)
                self.writes[LEASES][station + record.session.encode()] = _encode(lease)
            case r.LeaseEnded():
                self.writes[LEASES][station + record.session.encode()] = None
            case r.Parked():
                self._advance_queue(station, record.workflow, record.queue_sequence)
            case r.EventParked():
                self._advance_queue(station, EVENTS_KEY, record.sequence)
            case r.Deleted():
                for serial in record.serials:
                    self._delete(station, serial, record)
                self._forget_tombs(station, record.at, len(record.serials) + TOMBS_PER_RECORD)
            case r.Snapshot():
                self._count_snapshot(station, record, position)
            case r.Delivered():
                self._deliver(station, record)
            case _:
                pass

    def _count_snapshot(self, station: bytes, record: r.Snapshot, position: r.Position) -> None:
        table = self.writes[SNAPSHOTS]
        data = table.get(station) or self._lookup.get(SNAPSHOTS, station)
        rows = decode_snapshots(data) if data else []
        rows.append(r.SnapshotRow(record, position, r.next_covered(record, position)))
        table[station] = _encode(rows[-SNAPSHOTS_KEPT:])

    def _apply_instance(self, station: bytes, record: r.Record) -> bool:
        """True when the record is new (protocol rule 4) and belongs to the history."""
        key = serial_key(station, record.serial)
        row = self._row(key)
        if type(record) is r.Admitted:
            if row is not None:
                return False
            self._admit(station, key, record)
            return True
        if type(record) is r.EventReceived and record.sequence:
            self._advance_queue(station, EVENTS_KEY, record.sequence)
        if row is None:
            if self._was_given(station, record.serial):
                return False  # it was deleted
            raise FoldError(f"a record of instance {record.serial}, which nobody admitted: {type(record).__name__}")
        if not _follows(row, record):
            return False
        before = row.status
        advance_row(row, record)
        if type(record) is r.Restarted and not record.from_key:
            self._erase_history(station, record.serial, since=(1, 2), before=record.run)
        if type(record) is r.Restarted and before.ended:
            self._empty_outbox(station, record.serial)  # its owner has seen that it is empty; another run begins
        if row.status != before:
            self._count(station, row.workflow, before, -1)
            self._count(station, row.workflow, row.status, 1)
            self._place(station, row.workflow, before, row.status, key[len(station):])
            if row.status.ended or before.ended:
                self.writes[LIVE][key] = None if row.status.ended else b""
        self._arm(station, row, record.serial)
        if type(record) is not r.Ended:
            self._mark(station, row, record.serial, 0)
        elif not self._send(station, row, record):
            self._mark(station, row, record.serial, record.delete_at)
        return True

    # -- the outbox ----------------------------------------------------------------------------------------------------

    def _send(self, station: bytes, row: r.InstanceRow, end: r.Ended) -> bool:
        """Note what the instance has to tell others of its end. True when that is anything: it is kept until then."""
        awaited = bool(row.parent) and Parent.parse(row.parent).waits
        errands = [errand for errand, due in ((r.Errand.END, awaited), (r.Errand.CHILDREN, end.children)) if due]
        entry = _encode(r.OutboxRow(end.run, end.delete_at))
        for errand in errands:
            self.writes[OUTBOX][outbox_key(station, end.serial, errand)] = entry
        return bool(errands)

    def _deliver(self, station: bytes, record: r.Delivered) -> None:
        """Take the entry out; with the last one the instance's retention begins to count."""
        told = self._outbox(station, record.of, record.errand)
        if told is None or told.run != record.of_run:
            return
        self.writes[OUTBOX][outbox_key(station, record.of, record.errand)] = None
        row = self._row(serial_key(station, record.of))
        if row is not None and not any(self._outbox(station, record.of, errand) for errand in r.Errand):
            self._mark(station, row, record.of, told.delete_at)

    def _outbox(self, station: bytes, serial: int, errand: r.Errand) -> r.OutboxRow | None:
        key, table = outbox_key(station, serial, errand), self.writes[OUTBOX]
        data = table[key] if key in table else self._lookup.get(OUTBOX, key)
        return decode_outbox(data) if data else None

    def _empty_outbox(self, station: bytes, serial: int) -> None:
        for errand in r.Errand:
            if self._outbox(station, serial, errand) is not None:
                self.writes[OUTBOX][outbox_key(station, serial, errand)] = None

    def _was_given(self, station: bytes, serial: int) -> bool:
        """Whether an instance had this serial, ever."""
        return serial <= self._highest(station)

    def _highest(self, station: bytes) -> int:
        known = self._serials.get(station)
        if known is None:
            data = self._lookup.get(SERIALS, station)
            known = int.from_bytes(data, "big") if data else 0
        return known

    def _admit(self, station: bytes, key: bytes, record: r.Admitted) -> None:
        self._rows[key] = r.InstanceRow(
            workflow=record.workflow, id=record.id, nonce=record.nonce, run=record.run, seq=record.seq,
            status=r.Status.RUNNING, created_at=record.created_at, admitted_at=record.at, version=record.version,
            parent=record.parent,
        )
        self._serials[station] = max(record.serial, self._highest(station))
        self.writes[IDS][id_key(station, record.workflow, record.id)] = record.serial.to_bytes(8, "big")
        self.writes[LIVE][key] = b""
        self._count(station, record.workflow, r.Status.RUNNING, 1)
        self._advance_queue(station, record.workflow, record.queue_sequence)

    def _advance_queue(self, station: bytes, workflow: str, sequence: int) -> None:
        table = self.writes[QUEUE]
        key = station + workflow.encode()
        data = table.get(key) or self._lookup.get(QUEUE, key)
        if sequence > (int.from_bytes(data, "big") if data else 0):
            table[key] = sequence.to_bytes(8, "big")

    def _count(self, station: bytes, workflow: str, status: r.Status, change: int) -> None:
        key = count_key(station, workflow, status)
        count = self._counts.get(key)
        if count is None:
            data = self._lookup.get(COUNTS, key)
            count = int.from_bytes(data, "big") if data else 0
        self._counts[key] = count + change

    def _place(self, station: bytes, workflow: str, before: r.Status, now: r.Status, serial: bytes) -> None:
        """Running ones have no place of their own, for every instance begins so: they are found among the live ones."""
        states = self.writes[STATES]
        if before is not r.Status.RUNNING:
            states[state_key(station, workflow, before, serial)] = None
        if now is not r.Status.RUNNING:
            states[state_key(station, workflow, now, serial)] = b""

    # -- deleting ------------------------------------------------------------------------------------------------------

    def _delete(self, station: bytes, serial: int, record: r.Deleted) -> None:
        """Everything of the instance, but a tombstone."""
        key = serial_key(station, serial)
        row = self._row(key)
        if row is None:
            return
        if row.armed:
            self.writes[TIMERS][timer_key(station, row.armed, serial)] = None
        if row.delete_at:
            self.writes[DELETIONS][timer_key(station, row.delete_at, serial)] = None
        del self._rows[key]
        self.writes[ROWS][key] = None
        self.writes[LIVE][key] = None
        self.writes[IDS][id_key(station, row.workflow, row.id)] = None
        self._count(station, row.workflow, row.status, -1)
        self._place(station, row.workflow, row.status, r.Status.RUNNING, key[len(station):])
        self._erase_history(station, serial, since=(0, 0), before=row.run + 1)
        self._empty_outbox(station, serial)
        tomb = tomb_key(station, row.workflow, row.id)
        forget_at = record.at + record.tombstone_ms
        self.writes[TOMBS][tomb] = _encode(r.TombRow(row.nonce, record.at, record.request, forget_at))
        self.writes[TOMB_DUE][timer_key(station, forget_at, serial)] = tomb[len(station):]

    def _erase_history(self, station: bytes, serial: int, *, since: tuple[int, int], before: int) -> None:
        """What was recorded from the (run, seq) `since` on, up to the run `before`."""
        start, end = history_key(station, serial, *since), history_key(station, serial, before, 0)
        for key in [key for key in self._history if start <= key < end]:
            del self._history[key]
        prefix, after = serial_key(station, serial), start
        while keys := self._lookup.keys(HISTORY, prefix, after, KEYS_PER_SCAN):
            for key in keys:
                if key < end:
                    self.writes[HISTORY][key] = None
            after = keys[-1] + b"\0"

    def _forget_tombs(self, station: bytes, now: int, limit: int) -> None:
        until = timer_key(station, now, 0)
        for key in self._lookup.keys(TOMB_DUE, station, station, limit):
            if key >= until:
                break
            self.writes[TOMB_DUE][key] = None
            tomb = station + (self._lookup.get(TOMB_DUE, key) or b"")
            data = self.writes[TOMBS].get(tomb) or self._lookup.get(TOMBS, tomb)
            if data and decode_tomb(data).forget_at < now:
                self.writes[TOMBS][tomb] = None

    def _mark(self, station: bytes, row: r.InstanceRow, serial: int, due: int) -> None:
        """See that the instance stands where its deletion is looked for, if it is to be deleted."""
        if due == row.delete_at:
            return
        deletions = self.writes[DELETIONS]
        if row.delete_at:
            deletions[timer_key(station, row.delete_at, serial)] = None
        if due:
            deletions[timer_key(station, due, serial)] = b""
        row.delete_at = due

    def _arm(self, station: bytes, row: r.InstanceRow, serial: int) -> None:
        due = row.wake_at if row.status is r.Status.WAITING else 0
        if due == row.armed:
            return
        timers = self.writes[TIMERS]
        if row.armed:
            timers[timer_key(station, row.armed, serial)] = None
        if due:
            timers[timer_key(station, due, serial)] = b""
        row.armed = due


def _follows(row: r.InstanceRow, record: r.Record) -> bool:
    """Whether the record is new (protocol rule 4). Raises FoldError when one is missing before it."""
    if type(record) is r.Restarted:
        if record.run > row.run + 1:
            raise FoldError(f"instance {row.workflow}/{row.id}: run {record.run} follows {row.run}")
        return record.run > row.run
    if record.run < row.run or record.seq <= row.seq or row.status.ended:
        return False
    if record.run > row.run or record.seq != row.seq + 1:
        raise FoldError(f"instance {row.workflow}/{row.id}: record {record.run}.{record.seq} follows {row.run}.{row.seq}")
    return True


def advance_row(row: r.InstanceRow, record: r.Record) -> None:
    """Change the row as the record says. The one place where a record becomes a status."""
    row.seq = record.seq
    match record:
        case r.StepDone() | r.StepFailed():
            _progress(row, step_key(record.step, record.name, record.occurrence))
        case r.SleepDone():
            _progress(row, step_key(r.StepKind.SLEEP, record.name, record.occurrence))
        case r.AttemptFailed():
            interruptions = row.interruptions if record.failure.type == INTERRUPTED_TYPE else 0
            _progress(row, "")
            row.interruptions = interruptions
            key = step_key(record.step, record.name, record.occurrence)
            row.timers = {**row.timers, key: record.retry_at}
            _go(row, idle=record.idle)
        case r.SleepStarted():
            row.timers = {**row.timers, step_key(r.StepKind.SLEEP, record.name, record.occurrence): record.due}
            _go(row, idle=record.idle)
            row.blocked_on = ""
        case r.WaitStarted():
            key = step_key(r.StepKind.EVENT, record.name, record.occurrence)
            row.timers = {**row.timers, key: record.due}
            row.awaits = {**row.awaits, key: record.type}
            _go(row, idle=record.idle)
            row.blocked_on = ""
        case r.EventReceived():
            row.buffered += 1
            if record.type in row.awaits.values():
                row.called_at = row.called_at or record.at
        case r.WaitDone():
            row.buffered -= 1
            row.called_at = 0
            _progress(row, step_key(r.StepKind.EVENT, record.name, record.occurrence))
        case r.WaitTimedOut():
            _progress(row, step_key(r.StepKind.EVENT, record.name, record.occurrence))
        case r.ChildBegun():
            _go(row, idle=False)
            row.blocked_on = ""
        case r.ChildCreated():
            row.timers = {**row.timers, step_key(r.StepKind.CHILD, record.name, record.occurrence): record.due}
            _go(row, idle=record.idle)
            row.blocked_on = ""
        case r.ChildEnded():  # from outside: whether it goes on now is for its status to say
            _forget_timer(row, step_key(r.StepKind.CHILD, record.name, record.occurrence))
            if row.status is r.Status.WAITING:
                row.called_at = row.called_at or record.at
        case r.Waiting():
            _go(row, idle=True)
        case r.Woken():
            row.status = r.Status.RUNNING
            row.called_at = 0
            row.blocked_on = ""
        case r.StepCancelled():
            _forget_timer(row, step_key(record.step, record.name, record.occurrence))
        case r.Interrupted():
            row.interruptions += 1
        case r.Blocked():
            row.blocked_on = record.reason
        case r.Ended():
            row.status = record.status
            row.ended_at = record.at
            _clear(row)
            _remember(row, record.request)
        case r.PauseAsked():
            row.status = r.Status.WAITING_FOR_PAUSE
            _remember(row, record.request)
        case r.Paused():
            row.status = r.Status.PAUSED
            row.paused_at = record.at
            _remember(row, record.request)
        case r.Resumed():
            row.status = r.Status.RUNNING
            row.paused_at = 0
            row.timers = {key: due + record.shift_ms for key, due in row.timers.items()}
            _remember(row, record.request)
        case r.Restarted():
            row.run = record.run
            row.status = r.Status.RUNNING
            row.version = record.version
            row.ended_at = row.paused_at = row.interruptions = 0
            _clear(row)
            _remember(row, record.request)
        case _:
            raise FoldError(f"no fold for a {type(record).__name__} of an instance")


def _progress(row: r.InstanceRow, finished: str) -> None:
    row.interruptions = 0
    row.blocked_on = ""
    _go(row, idle=False)
    _forget_timer(row, finished)


def _go(row: r.InstanceRow, *, idle: bool) -> None:
    """It has something to do, or nothing but open waits; a pause that was asked for comes first."""
    if row.status is not r.Status.WAITING_FOR_PAUSE:
        row.status = r.Status.WAITING if idle else r.Status.RUNNING


def _forget_timer(row: r.InstanceRow, step: str) -> None:
    if step in row.timers:
        row.timers = {key: due for key, due in row.timers.items() if key != step}
    if step in row.awaits:
        row.awaits = {key: type_ for key, type_ in row.awaits.items() if key != step}
        if not row.awaits:
            row.called_at = 0


def _clear(row: r.InstanceRow) -> None:
    """Nothing that was open counts any more."""
    row.timers, row.awaits = {}, {}
    row.called_at = row.buffered = 0
    row.blocked_on = ""


def _remember(row: r.InstanceRow, request: str) -> None:
    if request:
        row.requests = [*row.requests[1 - REQUESTS_KEPT:], request]


def load_writes(station: StationId, rows: Sequence[StoredRow], position: r.Position | None) -> Writes:
    """The writes that put a snapshot's rows in their place; the position only with the last ones."""
    prefix = station_key(station)
    writes: Writes = tuple({} for _ in TABLES)
    for row in rows:
        writes[row.table][prefix + row.key] = row.value
    if position is not None:
        writes[POSITION][prefix] = _encode(position)
    return writes


def merge(before: Mapping[bytes, bytes], writes: Mapping[bytes, bytes | None]) -> dict[bytes, bytes]:
    """One table after the writes; for tests and the in-memory store."""
    after = dict(before)
    for key, value in writes.items():
        if value is None:
            after.pop(key, None)
        else:
            after[key] = value
    return after
