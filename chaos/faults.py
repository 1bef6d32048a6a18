"""Faults as values: what, after how much work, for how long, to whom; and the schedule that a seed makes of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import msgspec

PAUSE_CALLBACKS = (40, 160)  # left between the end of one fault and the beginning of the next


class Kind(StrEnum):
    """What is done."""

    KILL_POD = "kill-pod"  # SIGKILL, while the ledger shows the pod inside a callback
    STOP_POD = "stop-pod"  # SIGSTOP, and SIGCONT later: a zombie
    KILL_SERVER = "kill-server"  # SIGKILL to the nats-server
    END_SERVER = "end-server"  # SIGTERM to it
    STOP_SERVER = "stop-server"  # SIGSTOP to it, and SIGCONT later
    SLOW_LINK = "slow-link"  # each byte of a pod arrives later
    DRIPPING_LINK = "dripping-link"  # so few bytes a second
    CUT_LINK = "cut-link"  # the pod's connections are reset, and refused
    SILENT_LINK = "silent-link"  # they stand, and nothing goes through: half-open
    PARTITION = "partition"  # packets between pod and server are dropped, both ways
    DEAF_POD = "deaf-pod"  # those from the server to the pod are
    MUTE_POD = "mute-pod"  # those from the pod to the server are
    OOM = "oom"  # the pod's memory is bounded below what it needs: the kernel kills it
    STARVE = "starve"  # the pod gets a small share of a CPU


OF_SERVER = frozenset({Kind.KILL_SERVER, Kind.END_SERVER, Kind.STOP_SERVER})
OF_LINK = frozenset({Kind.SLOW_LINK, Kind.DRIPPING_LINK, Kind.CUT_LINK, Kind.SILENT_LINK})
OF_NETWORK = frozenset({Kind.PARTITION, Kind.DEAF_POD, Kind.MUTE_POD})
OF_CGROUP = frozenset({Kind.OOM, Kind.STARVE})
DEADLY = frozenset({Kind.KILL_POD, Kind.OOM})
CUTTING_OFF = frozenset({Kind.STOP_POD, Kind.CUT_LINK, Kind.SILENT_LINK, Kind.PARTITION, Kind.DEAF_POD, Kind.MUTE_POD})

LASTS_TTLS: dict[Kind, tuple[float, float]] = {
    Kind.STOP_POD: (0.5, 10.0),
    Kind.STOP_SERVER: (0.3, 2.5),
    Kind.SLOW_LINK: (1.0, 3.0),
    Kind.DRIPPING_LINK: (1.0, 3.0),
    Kind.CUT_LINK: (0.3, 4.0),
    Kind.SILENT_LINK: (0.3, 4.0),
    Kind.PARTITION: (0.5, 4.0),
    Kind.DEAF_POD: (0.5, 4.0),
    Kind.MUTE_POD: (0.5, 4.0),
    Kind.STARVE: (1.0, 4.0),
}  # how long each kind lasts at least and at most, in TTLs; those that are not here last for a moment


class Fault(msgspec.Struct, frozen=True):
    """One planned fault."""

    number: int
    kind: Kind
    after: int
    """Callbacks that are left between the end of the fault before it and its beginning."""
    choice: float
    """Picks the victim among the pods, in order of their names: 0 to 1."""
    lasts_s: float = 0.0
    owner_of_zero: bool = False
    """The victim is the pod that owns station 0: the Gatekeeper."""
    strength: float = 0.5
    """How much of it, for what can be more or less: 0 to 1."""

    def __str__(self) -> str:
        lasting = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.kind}{' (owner of station 0)' * self.owner_of_zero}{lasting}"


class Recipe(NamedTuple):
    """What a schedule is drawn from."""

    kinds: Sequence[Kind]
    owners_of_zero: float = 0.25
    """Share of the faults of pods that hit station 0's owner; at least one does, if the share is not 0."""


def schedule(recipe: Recipe, *, count: int, seed: int, ttl_s: float, lasts_ttls: float | None = None) -> list[Fault]:
    """The faults of a run: the same for the same arguments. Each kind comes about equally often.

    `lasts_ttls`: how long each fault that lasts does, in TTLs; None = drawn for each, as LASTS_TTLS says.
    """
    rng = random.Random(seed)
    kinds = [kind for _ in range(-(-count // len(recipe.kinds))) for kind in _shuffled(rng, recipe.kinds)][:count]
    of_pods = [number for number, kind in enumerate(kinds) if kind not in OF_SERVER]
    wanted = max(1, round(len(of_pods) * recipe.owners_of_zero)) if recipe.owners_of_zero else 0
    zeros = set(rng.sample(of_pods, min(wanted, len(of_pods))))
    return [Fault(number, kind, rng.randint(*PAUSE_CALLBACKS), rng.random(), _lasts_s(rng, kind, ttl_s, lasts_ttls),
                  number in zeros, rng.random()) for number, kind in enumerate(kinds)]


def _shuffled(rng: random.Random, kinds: Sequence[Kind]) -> list[Kind]:
    return rng.sample(kinds, len(kinds))


def _lasts_s(rng: random.Random, kind: Kind, ttl_s: float, lasts_ttls: float | None) -> float:
    """Short ones as often as long ones, unless it is given: even on a logarithmic scale."""
    if kind not in LASTS_TTLS:
        return 0.0
    least, most = LASTS_TTLS[kind]
    drawn: float = least * (most / least) ** rng.random()
    return round(ttl_s * (drawn if lasts_ttls is None else lasts_ttls), 2)
