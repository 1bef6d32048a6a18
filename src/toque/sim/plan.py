"""A plan: everything that is decided before a simulated run begins, as values. The same plan gives the same run.

`toque.sim.draw` draws one from a seed; as JSON it can be kept, shrunk and run again. Times are virtual seconds, `at_s`
counted from the moment at which the first pods are started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

# -- faults ------------------------------------------------------------------------------------------------------------

KILL: Final = "kill"  # kill -9 of a pod; it comes back after `seconds`, on the disk that `how` says
TERM: Final = "term"  # SIGTERM of a pod; it comes back `seconds` after its exit
PAUSE: Final = "pause"  # SIGSTOP of a pod for `seconds`; `how` = commit: as soon as a step's result of it is stored
SUSPEND: Final = "suspend"  # the same, and its clock stands still too and never catches up (a stopped machine)
CUT: Final = "cut"  # a pod's connection is cut for `seconds`: `how` = pod, keeper or both
CUT_CLIENTS: Final = "cut clients"  # the clients' connections are cut for `seconds`
BROKER: Final = "broker"  # the broker is stopped for `seconds`
WRITE_DEAD: Final = "write-dead"  # a stream (`subject`: journal, or a workflow) takes no writes; restart after `seconds`
MESSAGES: Final = "messages"  # the next `times` messages on `subject`: `how` of MemoryBroker.fail_next, by `seconds`
LIMIT: Final = "limit"  # the account's max_concurrent becomes `times`

DISKS: Final = ("same", "lost", "stale", "torn", "rot")  # `stale` is `age_s` old; `torn` by a power cut
COMMIT: Final = "commit"
CONNECTIONS: Final = ("pod", "keeper", "both")


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """One fault. What the fields mean for each kind stands beside the kinds."""

    at_s: float
    kind: str
    pod: int = 0
    seconds: float = 0.0
    how: str = ""
    age_s: float = 0.0
    subject: str = ""
    times: int = 0

    def __str__(self) -> str:
        parts = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                 for name, value in msgspec.structs.asdict(self).items()
                 if value and name not in ("at_s", "kind", "pod")]
        where = f" of pod {self.pod}" if self.kind in (KILL, TERM, PAUSE, SUSPEND, CUT) else ""
        return f"{self.kind}{where} ({', '.join(parts)})"


# -- load --------------------------------------------------------------------------------------------------------------

class StepShape(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a workflow's run(): a step, a sleep, a wait for an event, or branches that go on side by side."""

    name: str
    kind: str = "do"  # do | sleep | event | gather | group
    seconds: float = 0.0  # inside the callback, or asleep
    sync: bool = False  # the callback runs in a thread
    fails: int = 0  # so many attempts raise
    hangs: int = 0  # so many attempts take longer than the time-out
    timeout_s: float = 0.0  # 0 = the default one; of a wait for an event: always given, and caught
    caught: bool = False  # run() goes on when the step has failed for good
    branches: tuple[tuple[StepShape, ...], ...] = ()


class Shape(msgspec.Struct, frozen=True):
    """A workflow."""

    name: str
    steps: tuple[StepShape, ...]


class Sending(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event that somebody sends to an instance."""

    at_s: float
    id: str
    how: str = "request"  # request | plain (a NATS publish)


class Creation(msgspec.Struct, frozen=True, omit_defaults=True):
    """One instance that somebody asks for. Creations of one `batch` (> 0) are sent in one call."""

    at_s: float
    workflow: str
    id: str
    how: str = "create"  # create | twice (two creators at once) | batch | plain (a NATS publish)
    batch: int = 0
    terminate_at_s: float = 0.0  # 0 = never
    events: tuple[Sending, ...] = ()


class HostClock(msgspec.Struct, frozen=True):
    """A pod's clock."""

    skew_s: float = 0.0
    rate: float = 1.0


class Plan(msgspec.Struct, frozen=True):
    """A whole run. `seed` also decides delays and interleavings; `knobs` say for people how it was drawn."""

    seed: int
    ttl_s: int
    stations: int
    limit: int
    retries: int  # of every step
    retry_delay_s: float
    delay_ms: tuple[float, float]  # of a message in one direction
    safety_s: float  # how long faults may happen
    clocks: tuple[HostClock, ...]  # one for each pod
    shapes: tuple[Shape, ...]
    creations: tuple[Creation, ...]
    faults: tuple[Fault, ...]
    knobs: str = ""
    snapshot_bytes: int = 0  # so much journal lies between two snapshots of a station; 0 = as much as in real pods


def to_json(plan: Plan) -> bytes:
    """For a file."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n"


def read_plan(path: Path) -> Plan:
    """Raises OSError, msgspec.MsgspecError."""
    return msgspec.json.decode(path.read_bytes(), type=Plan)
