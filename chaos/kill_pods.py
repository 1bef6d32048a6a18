"""The scenario *kill pods*: SIGKILL to pods while they work, judged from the ledger and the client's own log alone.

It knows no cluster: whoever runs it gives a callable that kills a pod and sees to its replacement. Creations go on
while pods die, each id of the later ones by two creators at once. The work is `toque.chaos.five_steps`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toque.chaos.five_steps import ORDER, RETRIES, STEPS, WORKFLOW, Order, result_of
from toque.chaos.history import COMPLETE, CREATE, RESULT, History, Op, read_history
from toque.chaos.ledger import ENTER, Entry, Ledger, LedgerClient, LedgerReader, read_ledger
from toque.chaos.ledger_checks import (
    KILLED,
    InstanceKey,
    Ledgered,
    Verdict,
    check_c1,
    check_c2,
    check_c3,
    check_e1,
    check_e3,
    check_l1,
    check_ledger,
    check_recovery,
    pair,
    recoveries,
)
from toque.client import Client, Instance, NewInstance
from toque.errors import ToqueError, Unavailable

CREATED_FIRST = 0.8  # of the instances: in batches, before the first kill; the others while pods die
CREATE_TIMEOUT = "60 seconds"  # longer than any take-over, so that each creation ends with an answer
ASKED_AT_ONCE = 200  # results waited for at one time
CREATED_AT_ONCE = 4
POLL_S = 0.1
INSIDE_POLL_S = 0.002
INSIDE_S_MAX = 5.0
PODS_S_MAX = 60.0  # until two pods answer, so that one can be killed

Kill = Callable[[str], int]
"""SIGKILL to the pod of this name; returns the process id. The caller of the scenario sees to a replacement."""


@dataclass(frozen=True, kw_only=True)
class KillPods:
    """What is killed, how often, and under which load. The same seed makes the same choices."""

    seed: int
    within_s: float
    """Bound of the recovery: the sessions' TTL + 2 s."""
    instances: int = 1000
    kills: int = 5
    """SIGKILLs, spread over the work; one of them, at least, hits the owner of station 0."""
    limit: int = 60
    """Of the account: instances inside callbacks at one time."""
    callback_ms: int = 80
    """How long each callback takes."""
    ends_within_s: float = 120.0
    """When not all instances have ended by then, the rest counts as lost."""

    def plan(self) -> list[Strike]:
        """The kills in order: after which share of the work, and whether station 0's owner is the victim."""
        rng = random.Random(self.seed)
        zero = rng.randrange(self.kills)
        return [Strike(after=(number + 0.5 + rng.random() / 2) / (self.kills + 1), owner_of_zero=number == zero,
                       choice=rng.random()) for number in range(self.kills)]


@dataclass(frozen=True)
class Strike:
    """One planned kill."""

    after: float  # share of all callbacks that have been left
    owner_of_zero: bool
    choice: float  # picks the victim among the pods, in order of their names


@dataclass
class Struck:
    """One kill that was carried out."""

    pod: str
    pid: int
    owned_zero: bool
    stations: list[str]


@dataclass
class Outcome:
    """What a run left behind, and the verdicts on it."""

    options: KillPods
    struck: list[Struck]
    ops: list[Op]
    ledger: Ledgered
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def cut(self) -> int:
        """Attempts that were inside when their process was killed."""
        return sum(recovery.cut for recovery in recoveries(self.ledger))

    def lines(self) -> list[str]:
        """The verdicts for people, a violation a line below its promise."""
        out = [f"seed {self.options.seed}: {len(self.struck)} kills "
               f"({', '.join(struck.pod + ' with station 0' * struck.owned_zero for struck in self.struck)}), "
               f"{len(self.ledger.visits)} callbacks entered, {self.cut} cut"]
        for verdict in self.verdicts:
            note = f" ({verdict.note})" if verdict.note else ""
            out.append(f"  {verdict.word:8} {verdict.id:6} {verdict.promise}: {verdict.checked} checked, "
                       f"{verdict.broken} broken{note}")
            out += [f"           {violation}" for violation in verdict.violations]
        return out


async def kill_pods(options: KillPods, *, client: Client, kill: Kill, ledger: Ledger, log: Path,
                    say: Callable[[str], None]) -> Outcome:
    """Run the scenario on pods that serve `toque.chaos.five_steps`, and judge it. Ends by itself.

    `log` becomes the client's own log. Sets the account's limit. Raises Unavailable when there are never two pods, to
    kill one of them.
    """
    say(f"kill_pods: seed {options.seed}")
    await set_limit(client, options.limit)
    with History(log) as history:
        run = _Run(options, client, kill, ledger, history, say)
        try:
            async with asyncio.timeout(options.ends_within_s):
                await run.work()
        except TimeoutError:
            say(f"not all instances have ended within {options.ends_within_s:g} s")
    outcome = Outcome(options, run.struck, read_history(log), pair(read_ledger(ledger.file)))
    outcome.verdicts = judge(outcome)
    return outcome


async def set_limit(client: Client, limit: int) -> None:
    """Set the account's limit, and wait until no more slots than that are leased: pods report once a second."""
    await client.accounts.set(client.account, max_concurrent=limit)
    deadline = time.monotonic() + PODS_S_MAX
    while sum(view.slots_leased for view in await client.pods()) > limit:
        if time.monotonic() > deadline:
            raise Unavailable(f"the pods still hold more than {limit} slots after {PODS_S_MAX:g} s")
        await asyncio.sleep(POLL_S)


class _Run:
    """One run of the scenario: creators, waiters and the killer, side by side."""

    def __init__(self, options: KillPods, client: Client, kill: Kill, ledger: Ledger, history: History,
                 say: Callable[[str], None]) -> None:
        self.struck: list[Struck] = []
        self._options = options
        self._client = client
        self._kill = kill
        self._ledger = ledger
        self._history = history
        self._say = say
        self._progress = _Progress(LedgerReader(ledger.file))
        self._asking = asyncio.Semaphore(ASKED_AT_ONCE)

    async def work(self) -> None:
        first = int(self._options.instances * CREATED_FIRST)
        async with asyncio.TaskGroup() as group:
            for handle in await self._create_batch(first):
                group.create_task(self._wait_for(handle))
            group.create_task(self._create_singly(group, range(first, self._options.instances)))
            group.create_task(self._strike_all())

    # -- creating and waiting ------------------------------------------------------------------------------------------

    async def _create_batch(self, count: int) -> list[Instance[Any]]:
        ops = [self._history.invoke(CREATE, WORKFLOW, _id(number)) for number in range(count)]
        items = [NewInstance(self._order(number), id=_id(number)) for number in range(count)]
        results = await self._client.create_batch(WORKFLOW, items)
        for op, result in zip(ops, results, strict=True):
            if result.error is None:
                self._history.ok(op)
            else:
                self._history.unknown(op, str(result.error))
        return [self._client.handle(WORKFLOW, result.id) for result in results if result.error is None]

    async def _create_singly(self, group: asyncio.TaskGroup, numbers: Iterable[int]) -> None:
        """Each id by two creators at once: one of them must be told that it exists."""
        places = asyncio.Semaphore(CREATED_AT_ONCE)

        async def create_twice(number: int) -> None:
            async with places:
                created = await asyncio.gather(self._create(number), self._create(number))
            if any(created):
                await self._wait_for(self._client.handle(WORKFLOW, _id(number)))

        for number in numbers:
            async with places:
                group.create_task(create_twice(number))
            await asyncio.sleep(self._pause_s)

    @property
    def _pause_s(self) -> float:
        """Between single creations: so that they last about as long as the work."""
        options = self._options
        work_s = options.instances * len(STEPS) * options.callback_ms / 1000 / options.limit
        return work_s / max(1, options.instances * (1 - CREATED_FIRST))

    async def _create(self, number: int) -> bool:
        try:
            with self._history.recording(CREATE, WORKFLOW, _id(number)):
                await self._client.create(WORKFLOW, self._order(number), id=_id(number), timeout=CREATE_TIMEOUT)
        except ToqueError:
            return False  # the log has what it was
        return True

    async def _wait_for(self, handle: Instance[Any]) -> None:
        async with self._asking:
            try:
                with self._history.recording(RESULT, WORKFLOW, handle.id) as op:
                    op.value = str(await handle.result())
                    op.status = COMPLETE
            except ToqueError:
                return  # the log has what it was

    def _order(self, number: int) -> Order:
        return Order(number, self._options.callback_ms)

    # -- killing -------------------------------------------------------------------------------------------------------

    async def _strike_all(self) -> None:
        reporter = LedgerClient(self._ledger.socket, pod="scenario")
        total = self._options.instances * len(STEPS)
        for strike in self._options.plan():
            while self._progress.read().left < strike.after * total:
                await asyncio.sleep(POLL_S)
            await self._strike(strike, reporter)
        reporter.close()

    async def _strike(self, strike: Strike, reporter: LedgerClient) -> None:
        pods = await self._living_pods()
        zero = next(pod for pod, stations in pods.items() if any(name.endswith(".0") for name in stations))
        victim = zero if strike.owner_of_zero else sorted(pods)[int(strike.choice * len(pods))]
        await self._until_inside(victim)
        pid = self._kill(victim)
        reporter.mark(KILLED, pod=victim, pid=pid)
        self.struck.append(Struck(victim, pid, victim == zero, pods[victim]))
        self._say(f"killed {victim} (process {pid}, stations {' '.join(pods[victim])}{' with 0' * (victim == zero)})")
        began = time.monotonic()
        while self._progress.read().waits_for(pid):
            await asyncio.sleep(POLL_S)
        self._say(f"  all that was inside of it goes on elsewhere after {time.monotonic() - began:.2f} s")

    async def _living_pods(self) -> Mapping[str, list[str]]:
        """The stations of each pod that answers, once there are two pods and an owner of station 0."""
        deadline = time.monotonic() + PODS_S_MAX
        while time.monotonic() < deadline:
            pods = {view.pod: view.stations for view in await self._client.pods() if view.stations}
            if len(pods) >= 2 and any(name.endswith(".0") for names in pods.values() for name in names):
                return pods
            await asyncio.sleep(POLL_S)
        raise Unavailable(f"there are no two pods with stations after {PODS_S_MAX:g} s")

    async def _until_inside(self, pod: str) -> None:
        """Wait until the pod is inside a callback; not for ever. No await comes between the look and the return."""
        deadline = time.monotonic() + INSIDE_S_MAX
        while not self._progress.read().is_inside(pod) and time.monotonic() < deadline:
            await asyncio.sleep(INSIDE_POLL_S)


class _Progress:
    """Follows the ledger while it grows: how much is done, who is inside, whom a kill has stopped."""

    def __init__(self, reader: LedgerReader) -> None:
        self._reader = reader
        self._inside: dict[tuple[str, str], Entry] = {}  # (instance, step) → its enter
        self._last: dict[str, int] = {}  # instance that has not ended → the process that entered it last
        self._killed: dict[int, set[str]] = {}  # pid → instances that were with it, and nobody has entered since
        self.left = 0

    def read(self) -> _Progress:
        for entry in self._reader.read_new():
            if entry.kind == ENTER:
                self._entered(entry)
            elif entry.note == KILLED:
                self._was_killed(entry.pid)
            elif self._inside.pop((entry.instance, entry.step), None) is not None:
                self.left += 1
                if entry.step == STEPS[-1]:
                    self._last.pop(entry.instance, None)
        return self

    def is_inside(self, pod: str) -> bool:
        return any(enter.pod == pod for enter in self._inside.values())

    def waits_for(self, pid: int) -> set[str]:
        """Instances that were with the killed process, and that nobody has entered since."""
        return self._killed[pid]

    def _entered(self, entry: Entry) -> None:
        self._inside[entry.instance, entry.step] = entry
        self._last[entry.instance] = entry.pid
        for pid, waiting in self._killed.items():
            if entry.pid != pid:
                waiting.discard(entry.instance)

    def _was_killed(self, pid: int) -> None:
        self._killed[pid] = {instance for instance, last in self._last.items() if last == pid}
        self._inside = {place: enter for place, enter in self._inside.items() if enter.pid != pid}


def _id(number: int) -> str:
    return f"order-{number:05}"


# -- judging -----------------------------------------------------------------------------------------------------------

def judge(outcome: Outcome) -> list[Verdict]:
    """Every promise of the scenario. One that nothing spoke of does not hold."""
    options, ops, ledger = outcome.options, outcome.ops, outcome.ledger
    expected = {InstanceKey(WORKFLOW, _id(number)): str(result_of(Order(number)))
                for number in range(options.instances)}
    return [
        check_kills(outcome),
        check_c1(ops, expected),
        check_c2(ops, ledger),
        check_c3(ops, ledger),
        check_e1(ops, ledger, ORDER),
        check_e3(ledger, retries=RETRIES.limit),
        check_l1(ledger, limit=options.limit),
        check_recovery(ledger, within_s=options.within_s),
        check_ledger(ledger),
    ]


def check_kills(outcome: Outcome) -> Verdict:
    """The faults themselves happened: each kill, one of them on station 0's owner, and attempts were cut."""
    verdict = Verdict("faults", "every kill happened, station 0's owner among them, and attempts were cut")
    verdict.checked = len(outcome.struck)
    if len(outcome.struck) < outcome.options.kills:
        verdict.violated(f"{len(outcome.struck)} of {outcome.options.kills} kills happened before the work ended")
    if not any(struck.owned_zero for struck in outcome.struck):
        verdict.violated("the owner of station 0 was never killed")
    if not outcome.cut:
        verdict.violated("no attempt was inside when its process was killed")
    verdict.note = f"{outcome.cut} attempts cut"
    return verdict
