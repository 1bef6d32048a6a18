"""The scenarios that there are, by name."""

from __future__ import annotations

from toque.chaos.faults import Kind, Recipe
from toque.chaos.load import LoadOptions
from toque.chaos.scenario import Scenario
from toque.errors import UsageError

SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for scenario in (
    Scenario(
        name="killing-pods", faults=5, recipe=Recipe([Kind.KILL_POD]),
        does="kill -9 of pods, each while the ledger shows it inside a callback"),
    Scenario(
        name="zombies", faults=3, recipe=Recipe([Kind.STOP_POD]),
        does="SIGSTOP of pods for 0.5 to 10 times the TTL, then SIGCONT"),
    Scenario(
        name="broker-restarts", faults=6, recipe=Recipe([Kind.KILL_SERVER, Kind.END_SERVER, Kind.STOP_SERVER]),
        does="kill -9, SIGTERM and SIGSTOP of the nats-server"),
    Scenario(
        name="gatekeeper-loss", faults=4, recipe=Recipe([Kind.KILL_POD], owners_of_zero=1.0),
        load=LoadOptions(instances=120, limit=8), does="kill -9 of the owner of station 0, under a limit of 8"),
    Scenario(
        name="slow-and-cut-links", faults=4,
        recipe=Recipe([Kind.SLOW_LINK, Kind.DRIPPING_LINK, Kind.CUT_LINK, Kind.SILENT_LINK]),
        does="links between pods and server that are slow, drip, are cut, or half-open"),
    Scenario(
        name="partitions", faults=3, recipe=Recipe([Kind.PARTITION, Kind.DEAF_POD, Kind.MUTE_POD]),
        does="packets between pods and server dropped, in both directions and in one"),
    Scenario(
        name="oom", faults=3, recipe=Recipe([Kind.OOM]), load=LoadOptions(ballast_kb=1024),
        does="pods killed by the kernel for their memory"),
    Scenario(
        name="cpu-starvation", faults=3, recipe=Recipe([Kind.STARVE]),
        does="pods with 2 to 15 % of a CPU for 1 to 4 times the TTL"),
)}


def scenario_named(name: str) -> Scenario:
    """Raises UsageError, with the names that there are."""
    if name not in SCENARIOS:
        raise UsageError(f"there is no scenario {name!r}; there are {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
