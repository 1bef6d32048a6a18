"""Watches the pod's event loop from another thread, and names what holds it up (protocol rule 7).

The loop beats ten times a second. The session's keeper looks as often, from its own thread: when a beat is long overdue it
samples what the loop's thread is doing, and says once which workflow, instance and step that is, and where; once more when
the session is no longer renewed for it. The loop itself measures each beat's lag, so `toque pods` can show the worst one.

A process that was stopped, or gets no CPU, is late as a whole: the watch then misses its own looks, and accuses nobody.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

from toque._logging import get_logger
from toque.storage.ports import Clock
from toque.workers.attempt import step_inside
from toque.workers.attempts import Attempts
from toque.workers.engine import Engine
from toque.workers.instance_loop import InstanceLoop

BEAT_S: Final = 0.1
STALL_S: Final = 0.5
"""A loop that has not turned for so long is blocked."""
RENEWED_OF_TTL: Final = 0.5  # of a longer stall the session is not renewed (protocol rule 7)
LOOK_S_MAX: Final = 0.5  # between two looks; after a longer pause the process itself stood still
REPORTED_S: Final = 60.0  # so long a lag is shown
FRAMES_SHOWN: Final = 8

_FOREIGN = tuple(f"{folder}/" for folder in (
    *(sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(__file__).parents[1]))  # where the app's own code is not
_OF_ENGINE = {Engine.turn.__code__.co_filename, Attempts.done.__code__.co_filename}
_ASYNC_CODE = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

_log = get_logger("toque.loop")


@dataclass(frozen=True)
class Culprit:
    """What the loop's thread was doing when somebody looked. Texts are "" where they do not apply."""

    by: str
    """What blocks: run() itself, an async callback, sync code in one, or no step at all."""
    remedy: str
    workflow: str = ""
    instance: str = ""
    step: str = ""
    at: str = ""
    """The innermost line of the app's own code: file:line and function."""
    stack: str = ""
    """The innermost frames, innermost first."""

    def __str__(self) -> str:
        step = f"step {self.step!r} of " if self.step else ""
        whose = f", {step}{self.workflow}/{self.instance}" if self.workflow else ""
        return f"{self.by}{whose}, at {self.at}"

    def same_as(self, other: Culprit) -> bool:
        """Whether it is the same step (the line may be another)."""
        return (self.workflow, self.instance, self.step) == (other.workflow, other.instance, other.step)


class Lag(NamedTuple):
    """How late the loop was, and the culprit, if anybody looked meanwhile."""

    seconds: float
    by: str


class LoopWatch:
    """One loop's watch. `start`, `close` and the figures belong to that loop, `look` to one other thread."""

    def __init__(self, clock: Clock, *, ttl_s: float) -> None:
        self.lag_s = 0.0  # of the last beat
        self._clock = clock
        self._unrenewed_s = ttl_s * RENEWED_OF_TTL
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._due = clock.boottime()  # when the next beat should be
        self._beats = 0
        self._timer: asyncio.TimerHandle | None = None
        self._worst: deque[tuple[float, Lag]] = deque()  # (when, lag): each is worse than those after it
        self._found: tuple[int, Culprit] | None = None  # by `look`: before which beat, and who
        # of the looking thread alone:
        self._looked_at = self._due
        self._regular_since = self._due
        self._first: tuple[int, Culprit] | None = None  # of this incident; its last beat
        self._reported = (0, 0)  # the last beat before the incident, and how often it was reported

    def start(self) -> None:
        """Beat from now on."""
        self._due = self._clock.boottime() + BEAT_S
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    def close(self) -> None:
        """Beat no more. Nobody may look any more either."""
        if self._timer is not None:
            self._timer.cancel()

    def worst(self) -> Lag:
        """The worst lag of the last minute."""
        self._forget(self._clock.boottime())
        return self._worst[0][1] if self._worst else Lag(0.0, "")

    # -- in the loop ---------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        now = self._clock.boottime()
        lag = max(0.0, now - self._due)
        found = self._found
        by = str(found[1]) if found is not None and found[0] == self._beats else ""
        if by:
            _log.warning("the pod's loop turns again", seconds=round(lag, 1), blocked_by=by)
        self.lag_s = lag
        while self._worst and self._worst[-1][1].seconds <= lag:
            self._worst.pop()
        self._worst.append((now, Lag(lag, by)))
        self._forget(now)
        self._due = now + BEAT_S
        self._beats += 1
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    def _forget(self, now: float) -> None:
        while self._worst and self._worst[0][0] < now - REPORTED_S:
            self._worst.popleft()

    # -- in the thread that looks --------------------------------------------------------------------------------------

    def look(self) -> None:
        """Call it ten times a second. Reports a loop that is blocked, once per incident and once more at TTL/2."""
        now, beats = self._clock.boottime(), self._beats
        if now - self._looked_at > LOOK_S_MAX:
            self._regular_since = now
        self._looked_at = now
        late = now - max(self._due, self._regular_since)
        if late < STALL_S / 2:
            return
        culprit = sample(self._loop, self._thread)
        if self._first is None or self._first[0] != beats:
            self._first = (beats, culprit)
        if late >= STALL_S:
            self._report(beats, late, culprit)

    def _report(self, beats: int, late: float, culprit: Culprit) -> None:
        times = self._reported[1] if self._reported[0] == beats else 0
        assert self._first is not None
        if not culprit.same_as(self._first[1]):
            culprit = Culprit(f"one step after the other, none for long; just now: {culprit.by}",
                              "let fewer run at once (--slots), or give the pod more CPU", culprit.workflow,
                              culprit.instance, culprit.step, culprit.at, culprit.stack)
        details = {"seconds": round(late, 1), "by": culprit.by, "workflow": culprit.workflow,
                   "instance": culprit.instance, "step": culprit.step, "at": culprit.at, "stack": culprit.stack,
                   "remedy": culprit.remedy}
        if times == 0:
            self._found = (beats, culprit)
            self._reported = (beats, 1)
            _log.error("the pod's loop is blocked", **details)
        elif times == 1 and late >= self._unrenewed_s:
            self._reported = (beats, 2)
            _log.error("the pod's loop is blocked so long that its session is not renewed", **details)


# -- what a thread is doing --------------------------------------------------------------------------------------------

def sample(loop: asyncio.AbstractEventLoop, thread: int) -> Culprit:
    """What the loop, which runs in that other thread, is busy with now, as well as can be told from outside."""
    frame = sys._current_frames().get(thread)
    frames = list(_outwards(frame)) if frame is not None else []
    at, stack = _place(frames)
    task = asyncio.current_task(loop)
    if (engine := _engine_inside(frames)) is not None:
        return _of_engine(frames, engine, at, stack)
    step = _step_of(task) if task is not None else None
    if step is None:
        return Culprit("no step: Toque itself, or code that is called by the loop without a task",
                       "look at the line; give the pod more CPU if it has too little", at=at, stack=stack)
    by = "the async callback" if frames[0].f_code.co_flags & _ASYNC_CODE else "sync code in the async callback"
    return Culprit(by, "make the callback a plain `def` (it then runs in a thread), or await inside it", *step, at, stack)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _engine_inside(frames: list[FrameType]) -> Engine | None:
    for frame in frames:
        if frame.f_code.co_filename not in _OF_ENGINE:
            continue
        owner = frame.f_locals.get("self")
        if isinstance(owner, Engine):
            return owner
        if isinstance(owner, Attempts):
            return owner.engine
    return None


def _of_engine(frames: list[FrameType], engine: Engine, at: str, stack: str) -> Culprit:
    """Code of the instance that is no callback."""
    in_run = any(frame.f_code is InstanceLoop.drain.__code__ for frame in frames)
    by = "run() itself" if in_run else "what encodes or decodes a value of the instance"
    return Culprit(by, "run() must only await steps: put what takes long into one" if in_run
                   else "return smaller values, or cheaper types", engine.admitted.workflow, engine.admitted.id, "",
                   at, stack)


def _step_of(task: asyncio.Task[Any]) -> tuple[str, str, str] | None:
    """Workflow, instance and step of the callback that runs as this task or has made it."""
    if sys.version_info >= (3, 12):
        context: contextvars.Context | None = task.get_context()
    else:  # there is no public way to a task's context, but the garbage collector knows what a task holds
        context = next((held for held in gc.get_referents(task) if isinstance(held, contextvars.Context)), None)
    return context.get(step_inside) if context is not None else None


def _place(frames: list[FrameType]) -> tuple[str, str]:
    """The innermost line of the app, or else of all; and the innermost frames."""
    own = next((frame for frame in frames if not frame.f_code.co_filename.startswith(("<", *_FOREIGN))), None)
    shown = " < ".join(_line(frame) for frame in frames[:FRAMES_SHOWN])
    return _line(own or frames[0]) if frames else "nowhere: the thread is gone", shown


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"
