"""The simulator's command line: what it refuses, and what it says of a plan that holds."""

from __future__ import annotations

import pytest

from toque.sim import __main__ as command
from toque.sim.draw import draw_plan
from toque.sim.plan import to_json
from toque.sim.sweep import Result


@pytest.mark.parametrize(("arguments", "says"), [
    (["sweep", "--seeds", "10-5"], "there are no seeds from 10 to 5"),
    (["sweep", "--seeds", "a-b"], "'a-b' is no range of seeds, as 1-500 is"),
    (["sweep", "--seeds", "1-2", "--jobs", "0"], "'0' is no number of processes"),
    (["sweep", "--seeds", "1-2", "--jobs=-1"], "no number of processes")])
def test_a_sweep_that_would_play_nothing_is_wrong_usage(arguments, says, capsys):
    """A turned range played no seed, and said with exit code 0 that none had failed."""
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)

    assert ended.value.code == command.USAGE
    assert says in capsys.readouterr().err


def test_shrinking_a_plan_that_breaks_nothing_says_so(monkeypatch, capsys):
    """It printed the whole plan, as if every fault in it were needed."""
    monkeypatch.setattr(command, "quiet", lambda: None)
    for module in ("toque.sim.__main__", "toque.sim.sweep"):
        monkeypatch.setattr(f"{module}.play_result", lambda plan: Result(plan.seed))

    assert command.main(["shrink", "--seed", "1"]) == command.OK

    told = capsys.readouterr()
    assert told.out == to_json(draw_plan(1)).decode()
    assert "breaks nothing" in told.err
