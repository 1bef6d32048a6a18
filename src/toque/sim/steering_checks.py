"""The model of a steered instance, and the judgement of a run by it.

The journal is the order in which things happened: each record that a call made carries the call's id. So a history is
linearisable when the model allows the journal's order, each record of a call lies between its invocation and its return
(or behind it, while the outcome is unknown), and each answer fits to what the instance was at some moment in between.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from toque._payload import decode, decode_params
from toque._subjects import StationId
from toque.chaos.verdicts import InstanceKey, Verdict
from toque.sim.checks import check_chains, check_folds
from toque.sim.world import World
from toque.storage import records as r

SILENCE: Final = "silence"
NOT_FOUND: Final = "not_found"
NONE, LIVE, PAUSING, PAUSED = "none", "live", "waitingForPause", "paused"
ENDED: Final = ("complete", "errored", "terminated")
STATES: Final = {"running": LIVE, "waiting": LIVE}  # as told → as modelled; all others are called the same
SLACK_S: Final = 0.002  # journal times are whole milliseconds
REMAINS: Final = (r.StepDone, r.StepFailed, r.AttemptFailed, r.EventReceived, r.Interrupted)  # while callbacks finish
NO_EFFECT: Final = {  # an "ok" without a record: what the instance was then
    "pause": (PAUSING, PAUSED), "resume": (LIVE, NONE), "restart": (NONE,), "terminate": ("terminated",)}


@dataclass
class Call:
    """What a client asked for, and what it was told. Times are virtual seconds."""

    number: int
    what: str
    workflow: str
    instance: str
    invoked_at: float
    returned_at: float = math.inf
    code: str = SILENCE  # of the answer, or "silence"
    status: str = ""  # of `status`

    @property
    def key(self) -> InstanceKey:
        return InstanceKey(self.workflow, self.instance)

    @property
    def request(self) -> str:
        return f"call-{self.number}"

    @property
    def known(self) -> bool:
        return self.code != SILENCE

    def __str__(self) -> str:
        return f"call {self.number} ({self.what} {self.workflow}/{self.instance} -> {self.code} {self.status})"

    def spans(self, began: float, ended: float) -> bool:
        """Whether it was under way at some moment of the stretch."""
        return began <= self.returned_at + SLACK_S and self.invoked_at - SLACK_S <= ended


@dataclass
class Stretch:
    """What an instance was for a while. Its owner knows of the end of it at `known_at` at the latest: answers until then
    may tell what was, for nobody was told of the end yet."""

    state: str
    since: float
    until: float = math.inf
    known_at: float = math.inf


@dataclass
class Story:
    """Everything that happened to one id, by the journal."""

    stretches: list[Stretch] = field(default_factory=lambda: [Stretch(NONE, 0.0)])
    effects: dict[str, list[tuple[float, Any]]] = field(default_factory=lambda: defaultdict(list))  # by request
    admitted: list[tuple[float, r.Admitted]] = field(default_factory=list)
    buffered: list[r.EventReceived] = field(default_factory=list)  # of the present run
    given: list[Any] = field(default_factory=list)  # payloads, of the present run
    run: int = 1

    def go(self, state: str, at: float, known_at: float) -> None:
        if state != self.state:
            self.stretches[-1].until, self.stretches[-1].known_at = at, known_at
            self.stretches.append(Stretch(state, at))

    @property
    def state(self) -> str:
        return self.stretches[-1].state

    def ever(self, call: Call, states: Sequence[str]) -> bool:
        """Whether it was one of these at some moment of the call."""
        return any(stretch.state in states and call.spans(stretch.since, stretch.known_at) for stretch in self.stretches)


class Stories:
    """The model, run over the journal."""

    def __init__(self, world: World, calls: Sequence[Call]) -> None:
        self._returns = {call.request: call.returned_at for call in calls if call.code == "ok"}
        self.legal = Verdict("S2", "nothing happened to an instance that its state did not allow")
        self.fifo = Verdict("V1", "events were given out in their order, each once, none of another run")
        self.of: dict[InstanceKey, Story] = defaultdict(Story)
        for station in world.stations():
            self._read(world, station)

    def _read(self, world: World, station: StationId) -> None:
        keys: dict[int, InstanceKey] = {}
        times = [(message.time_ms - world.broker.epoch_ms) / 1000 for message in world.journal_messages(station)]
        for place, group in enumerate(world.journal(station)):
            at, *later = times[place:place + 2]
            for record in group.records:
                if isinstance(record, r.Admitted):
                    keys[record.serial] = InstanceKey(record.workflow, record.id)
                for serial in record.serials if isinstance(record, r.Deleted) else [record.serial]:
                    if serial:
                        self._happened(keys[serial], at, record, later[0] if later else math.inf)

    def _happened(self, key: InstanceKey, at: float, record: Any, known_at: float) -> None:
        story = self.of[key]
        self.legal.checked += 1
        before = story.state
        after = _after(before, record)
        if after is None:
            self.legal.violated(f"{key}: {record} while it was {before}, at {at:.3f}")
            return
        if request := getattr(record, "request", ""):
            story.effects[request].append((at, record))
        elif isinstance(record, r.Resumed | r.Restarted | r.Deleted | r.PauseAsked) or (
                isinstance(record, r.Paused) and before != PAUSING) or after == "terminated" != before:
            self.legal.violated(f"{key}: {record}, which nobody asked for")
        self._events(key, story, at, record)
        returned_at = self._returns.get(getattr(record, "request", ""), math.inf)
        story.go(after, at, min(known_at, returned_at))

    def _events(self, key: InstanceKey, story: Story, at: float, record: Any) -> None:
        if isinstance(record, r.Admitted):
            story.admitted.append((at, record))
            story.run = 1
        elif isinstance(record, r.EventReceived):
            story.effects[record.event_id].append((at, record))
            story.buffered.append(record)
        elif isinstance(record, r.WaitDone):
            self.fifo.checked += 1
            if not story.buffered or story.buffered[0].seq != record.event:
                self.fifo.violated(f"{key}: {record}, while {[event.seq for event in story.buffered]} were there")
                return
            story.given.append(decode(story.buffered.pop(0).payload, Any, what="an event"))
        elif isinstance(record, r.Ended) and record.status is r.Status.COMPLETE:
            output = decode(record.output, Any, what="the output")
            if output != story.given:
                self.fifo.violated(f"{key}: its output is {output}, it was given {story.given}")
        if isinstance(record, r.Admitted | r.Restarted):
            story.buffered, story.given = [], []


def _after(state: str, record: Any) -> str | None:
    """The state behind a record; None for one that must not come in this state."""
    match record:
        case r.Admitted():
            return LIVE if state == NONE else None
        case r.Deleted():
            return NONE if state != NONE else None
        case r.Restarted():
            return LIVE if state != NONE else None
        case _ if state == NONE or state in ENDED:
            return None
        case r.Ended():
            return record.status.label if record.status is r.Status.TERMINATED or state == LIVE else None
        case r.PauseAsked():
            return PAUSING if state == LIVE else None
        case r.Paused():
            return PAUSED if state != PAUSED else None
        case r.Resumed():
            return LIVE if state != LIVE else None
        case r.EventReceived():
            return state
        case _ if state == PAUSED:
            return None
        case _ if state == PAUSING and not isinstance(record, REMAINS):
            return None
    return state


# -- the judgement -----------------------------------------------------------------------------------------------------

def judge(world: World, calls: Sequence[Call]) -> list[Verdict]:
    """Every verdict over a run that is quiet again."""
    stories = Stories(world, calls)
    return [stories.legal, stories.fifo, check_asked(stories, calls), check_effects(stories, calls),
            check_told(stories, calls), check_created(stories, calls), check_entries(world, stories),
            _asserted("P1", "each station's journal is one chain of epochs", lambda: check_chains(world)),
            _asserted("D4", "folded state equals a replay of the journal", lambda: check_folds(world))]


def _asserted(id_: str, promise: str, check: Any) -> Verdict:
    verdict = Verdict(id_, promise, 1)
    try:
        check()
    except AssertionError as error:
        verdict.violated(str(error))
    return verdict


def check_asked(stories: Stories, calls: Sequence[Call]) -> Verdict:
    """Nothing happened that nobody asked for, and nothing before it was asked for, or after it was refused."""
    verdict = Verdict("V5", "every record of a call was made by that call, while it was under way")
    asked = {call.request: call for call in calls}
    for key, story in stories.of.items():
        for request, effects in story.effects.items():
            verdict.checked += 1
            call = asked.get(request)
            if call is None or call.key != key:
                verdict.violated(f"{key}: {effects[0][1]}, which nobody asked for")
                continue
            late = math.inf if not call.known else call.returned_at
            if not all(call.invoked_at - SLACK_S <= at <= late + SLACK_S for at, _ in effects):
                verdict.violated(f"{call}, from {call.invoked_at:.3f} to {call.returned_at:.3f}: {effects}")
            gone = call.what == "event" and call.code == NOT_FOUND  # the instance was deleted before the call came again
            if call.known and call.code != "ok" and not gone:
                verdict.violated(f"{call}: and yet {effects}")
    return verdict


def check_effects(stories: Stories, calls: Sequence[Call]) -> Verdict:
    """Acknowledged calls hold: each has its record, or there was nothing to do; and none was done twice."""
    verdict = Verdict("V3", "every acknowledged call was carried out, once")
    for call in calls:
        story = stories.of[call.key]
        effects = story.effects.get(call.request, [])
        if call.what in ("create", "status"):
            continue
        verdict.checked += call.code == "ok"
        runs = {(record.serial, record.run) for _, record in effects}  # each knows the events that it got
        if len(effects) > (len(runs) if call.what == "event" else 1):
            verdict.violated(f"{call} was carried out {len(effects)} times: {effects}")
        if call.code == "ok" and not effects and not story.ever(call, NO_EFFECT.get(call.what, ())):
            verdict.violated(f"{call}, from {call.invoked_at:.3f} to {call.returned_at:.3f}, did nothing: "
                             f"{[(s.state, round(s.since, 3)) for s in story.stretches]}")
    return verdict


def check_told(stories: Stories, calls: Sequence[Call]) -> Verdict:
    """Answers fit to what the instance was at some moment between question and answer."""
    verdict = Verdict("S1", "every answer was true at some moment of its call")
    created = _creations(stories, calls)
    for call in calls:
        fits = _fits(stories.of[call.key], call, created[call.key])
        verdict.checked += fits is not None
        if fits is False:
            verdict.violated(f"{call}, from {call.invoked_at:.3f} to {call.returned_at:.3f}: "
                             f"{[(s.state, round(s.since, 3)) for s in stories.of[call.key].stretches]}")
    return verdict


def _creations(stories: Stories, calls: Sequence[Call]) -> dict[InstanceKey, list[tuple[float, float, float]]]:
    """Of each id: when a creation was asked for, when it is known to lie in the queue, and when it was admitted."""
    found: dict[InstanceKey, list[tuple[float, float, float]]] = defaultdict(list)
    for call in calls:
        if call.what == "create" and call.code in ("ok", SILENCE):
            at = [at for at, record in stories.of[call.key].admitted if _params(record) == call.number]
            sure = call.returned_at if call.code == "ok" else math.inf
            if at or call.code == SILENCE:
                found[call.key].append((call.invoked_at, sure, at[0] if at else math.inf))
    return found


def _fits(story: Story, call: Call, created: Sequence[tuple[float, float, float]]) -> bool | None:
    """None: there is nothing to judge."""
    if call.code == NOT_FOUND:
        queued = [(sure, admitted) for _, sure, admitted in created if sure < admitted]
        return any(stretch.state == NONE and call.spans(stretch.since, stretch.known_at)
                   and not any(sure + SLACK_S < call.invoked_at and call.returned_at < admitted for sure, admitted in queued)
                   for stretch in story.stretches)
    if call.code == "ended":
        return story.ever(call, ENDED)
    if call.what != "status" or call.code != "ok":
        return None
    if call.status == "queued":
        return story.ever(call, (NONE,)) and any(call.spans(asked, math.inf) for asked, _, _ in created)
    return story.ever(call, (STATES.get(call.status, call.status),))


def check_created(stories: Stories, calls: Sequence[Call]) -> Verdict:
    """C1, C2: acknowledged creations were admitted once, unknown ones at most once, refused ones never."""
    verdict = Verdict("C2", "creations were admitted as often as their outcome allows")
    for call in calls:
        if call.what != "create":
            continue
        verdict.checked += 1
        story = stories.of[call.key]
        times = sum(_params(record) == call.number for _, record in story.admitted)
        deletions = sum(s.state == NONE and call.invoked_at <= s.since <= call.returned_at for s in story.stretches)
        forgotten = call.code == "exists" and deletions > 1  # its tombstone has made room for the next one
        refused = call.code not in ("ok", SILENCE) and not forgotten
        if times > 1 or (call.code == "ok" and not times) or (refused and times):
            verdict.violated(f"{call} was admitted {times} times")
    return verdict


def _params(record: r.Admitted) -> Any:
    return decode_params(record.params, record.content_type, Any, what="params")


def check_entries(world: World, stories: Stories) -> Verdict:
    """V3 to V5: no callback is entered while its instance is paused, or to be, has ended, or is gone."""
    verdict = Verdict("V4", "callbacks were entered while their instance was to run, only")
    for visit in world.history.entries:
        verdict.checked += 1
        story = stories.of[InstanceKey(visit.workflow, visit.instance)]
        at = visit.entered_at
        if not any(s.state == LIVE and s.since - SLACK_S <= at <= s.until + SLACK_S for s in story.stretches):
            verdict.violated(f"{visit}: {[(s.state, round(s.since, 3)) for s in story.stretches]}")
    return verdict


def counts(world: World, calls: Sequence[Call]) -> Counter[str]:
    """What happened, for a sweep."""
    seen: Counter[str] = Counter()
    for call in calls:
        seen[f"{call.what} {call.code}"] += 1
        if call.status:
            seen[f"told {call.status}"] += 1
    for station in world.stations():
        for group in world.journal(station):
            seen.update(f"{type(record).__name__} records" for record in group.records)
    return seen
