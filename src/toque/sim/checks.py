"""Checkers over a whole world: what must hold after every story, whatever happened in it. Each names what broke."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from toque._subjects import StationId
from toque.sim.node import PodNode
from toque.sim.world import World
from toque.storage import fold
from toque.storage import records as r
from toque.storage.memory_store import MemoryTables


def check_chains(world: World) -> None:
    """P1: each station's journal is one chain; an epoch begins with a claim over a release or an ended session."""
    for station in world.stations():
        before: r.GroupHeader | None = None
        released = True
        for group in world.journal(station):
            header = group.header
            claims = isinstance(group.records[0], r.Claim) if group.records else False
            assert header.group == (before.group + 1 if before else 1), f"{station}: a gap before {header}"
            if claims:
                assert header.epoch == (before.epoch + 1 if before else 1), f"{station}: {header} after {before}"
                if before is not None and not released and before.session != header.session:
                    ended = world.session_key(before.session)
                    assert ended is not None and ended.ended, f"{station}: {header} claims from a living session"
            else:
                assert before is not None and (header.epoch, header.session) == (before.epoch, before.session), \
                    f"{station}: {header} follows {before} without a claim"
                assert not released, f"{station}: {header} follows a release without a claim"
            released = any(isinstance(record, r.Released) for record in group.records)
            before = header


def replayed(world: World, station: StationId, *, until: int | None = None) -> MemoryTables:
    """The journal of a station, folded from the start."""
    tables = MemoryTables()
    batch = fold.FoldBatch(tables)
    for group in world.journal(station):
        if until is None or group.sequence <= until:
            batch.apply(r.Group(station, r.Position(group.sequence, group.header), group.records))
    tables.write(batch.finish())
    return tables


def check_fold(world: World, node: PodNode) -> None:
    """Folded state == replay of the journal up to its position, for every station that the node's disk knows."""
    for station in world.stations():
        prefix = fold.station_key(station)
        rotten = node.disk.tables.rotten
        if any(key.startswith(prefix) for _, key in rotten):
            continue  # nobody has read the row yet: its CRC guards it
        position = node.store.position(station)
        if position is None:
            continue
        expected = replayed(world, station, until=position.sequence)
        for number, name in enumerate(fold.TABLES):
            if number == fold.HISTORY:
                continue  # its rows are cut where groups were; compared below
            found = {key: value for key, value in node.disk.tables.tables[number].items() if key.startswith(prefix)}
            assert found == expected.tables[number], f"{node.name}, {station}: table {name} differs from the journal"


def check_folds(world: World) -> None:
    """`check_fold` for every living pod."""
    for node in world.living:
        if node.served:
            check_fold(world, node)


def check_leases(world: World, limit: int) -> None:
    """L1: what is leased out never exceeds the limit, at any point of station 0's journal."""
    leases: dict[str, int] = {}
    for group in world.journal(StationId(1, 0)):
        for record in group.records:
            if isinstance(record, r.Lease):
                leases[record.session] = record.slots
            elif isinstance(record, r.LeaseEnded):
                leases.pop(record.session, None)
            assert sum(leases.values()) <= limit, f"{leases} leased at {group.header}, the limit is {limit}"


def check_once(world: World, workflow: str, ids: Iterable[str]) -> None:
    """C1 and C2: each of these creations was admitted once and reached one terminal state."""
    admitted = Counter(record.id for record in world.records(r.Admitted) if record.workflow == workflow)
    ended: Counter[str] = Counter()
    for station in world.stations():
        names = {record.serial: record.id for record in world.records(r.Admitted, station)}
        ended.update(names[record.serial] for record in world.records(r.Ended, station))
    for instance in ids:
        assert admitted[instance] == 1, f"{instance} was admitted {admitted[instance]} times"
        assert ended[instance] == 1, f"{instance} ended {ended[instance]} times"


def check_steps(world: World, excused: Collection[tuple[int, str]] = ()) -> None:
    """E1: no callback was entered after its step's checkpoint stood in the journal, none outside of a living process; no
    instance ran after its end.

    `excused`: (process, session) whose clock was stopped, so that it could not know that its session was over.
    """
    done: dict[tuple[str, str, int], int] = {}
    ended: dict[str, int] = {}
    for station in world.stations():
        names = {record.serial: record.id for record in world.records(r.Admitted, station)}
        for message, group in zip(world.journal_messages(station), world.journal(station), strict=True):
            for record in group.records:
                if isinstance(record, r.StepDone | r.StepFailed):
                    key = (names[record.serial], record.name, record.occurrence)
                    assert key not in done, f"two outcomes of {key} in the journal"
                    done[key] = message.time_ms
                elif isinstance(record, r.Ended):
                    ended[names[record.serial]] = message.time_ms
    assert not world.history.outside, world.history.outside[0]
    for entry in world.history.entries:
        if (entry.pid, entry.session) in excused:
            continue
        at = world.broker.epoch_ms + entry.entered_at * 1000
        finished = done.get((entry.instance, entry.step, entry.count))
        assert finished is None or at <= finished + 1, f"{entry} was entered after its checkpoint"
        over = ended.get(entry.instance)
        assert over is None or at <= over + 1, f"{entry} was entered after the end of its instance"


def check_all(world: World, workflow: str, ids: Iterable[str], *, limit: int | None = None) -> None:
    """All of them, and every living pod's store."""
    check_chains(world)
    check_once(world, workflow, ids)
    check_steps(world)
    if limit is not None:
        check_leases(world, limit)
    for node in world.living:
        check_fold(world, node)
