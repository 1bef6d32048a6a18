"""Whether a figure grows, and what is read of a server."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace

import pytest

from toque.chaos.soak import (
    FIGURES,
    GROWTH_SAMPLES_MIN,
    LMDB,
    SAMPLE_S,
    TASKS,
    Sampler,
    SoakSample,
    check_r6,
    course_of,
    journal_of,
    kept_per_instance,
    of_processes,
    planned,
)
from toque.chaos.topology import PodSeen
from toque.sim.loop import run

COUNT = 40


def samples(of: str, values: list[float]) -> list[SoakSample]:
    """All figures flat at 100, but one."""
    return [SoakSample(place * 5.0, place * 10, {**{figure.name: 100.0 for figure in FIGURES}, of: value})
            for place, value in enumerate(values)]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_a_figure_that_grows_is_found(figure):
    """Steadily, by more than a tenth of itself and more than noise; the others stay flat."""
    values = [100.0 + place * figure.least for place in range(COUNT)]

    broken = [verdict for verdict in check_r6(samples(figure.name, values)) if verdict.broken]

    assert [verdict.promise for verdict in broken] == [f"{figure.name} is flat"]


def test_warming_up_is_no_growth():
    """Caches fill in the first quarter, and that is that."""
    values = [min(100.0 + 20 * place, 260.0) for place in range(COUNT)]

    assert not any(verdict.broken for verdict in check_r6(samples("pods: memory", values)))


def test_noise_around_a_level_is_flat():
    """A pod that was killed starts small again."""
    values = [100.0 + 10 * (place % 5) for place in range(COUNT)]

    assert all(verdict.holds for verdict in check_r6(samples("pods: memory", values)))


@pytest.mark.parametrize(("wanted", "sampled"), [(2, 12), (3, None)])
def test_the_tasks_of_all_pods_are_sampled(tmp_path, wanted, sampled):
    """Their sum, counted by the pods themselves; missing while a pod is missing, for it would look like a fall."""
    here = os.getpid()

    async def pods(*, count_tasks):
        return [PodSeen(name, here, name, ["1.0"], 1, tasks if count_tasks else 0) for name, tasks in (("a", 5), ("b", 7))]

    async def main():
        topology = SimpleNamespace(pods=pods, pods_wanted=wanted, server_pid=lambda: 0, monitor_url="", stores=())
        sampler = Sampler(topology, tmp_path / "soak.jsonl", lambda: 0)
        task = asyncio.ensure_future(sampler.run())
        await asyncio.sleep(1.5 * SAMPLE_S)
        task.cancel()
        return sampler.samples

    [sample] = run(main(), seed=1)

    assert sample.figures.get(TASKS) == sampled


def test_too_few_samples_do_not_hold():
    """A short run proves nothing, and does not break anything."""
    verdicts = check_r6(samples("pods: memory", [100.0] * (GROWTH_SAMPLES_MIN - 1)))

    assert {verdict.word for verdict in verdicts} == {"NOT SEEN"}


def test_a_course_tells_its_slope_per_hour():
    """One unit each ten seconds is 360 in an hour."""
    course = course_of([(10.0 * place, float(place)) for place in range(COUNT)])

    assert course.per_hour == pytest.approx(360)
    assert (course.first, course.last) == (0.0, COUNT - 1)


def test_lmdb_is_told_in_bytes_per_ended_instance():
    """It grows by 5,000 bytes while 10 instances end."""
    text = kept_per_instance(samples(LMDB, [5_000.0 * place for place in range(COUNT)]))

    assert text.startswith("500 bytes of LMDB")
    assert kept_per_instance([]) == ""


def test_the_journal_is_found_among_the_streams():
    """By its name, whatever the account."""
    streams = {"account_details": [{"stream_detail": [
        {"name": "toque+main+queue+five-steps", "state": {"messages": 7, "bytes": 700}},
        {"name": "toque+main+journal", "state": {"messages": 5, "bytes": 1024 * 1024}}]}]}

    assert journal_of(streams) == {"journal: messages": 5, "journal: size": 1.0}
    assert journal_of({}) == {}


def test_a_process_is_measured_from_outside():
    """This one has memory, files and threads."""
    figures = of_processes("pods", [os.getpid()])

    assert figures["pods: memory"] > 5
    assert figures["pods: file descriptors"] > 2
    assert figures["pods: threads"] >= 1


@pytest.mark.parametrize("minutes", [0.5, 1, 10, 60])
def test_faults_are_spread_and_leave_quiet_at_the_end(minutes):
    """About two a minute; the last one leaves time to settle."""
    count, every_s = planned(minutes)

    assert count >= 1
    assert count * every_s <= minutes * 60 * 0.86
