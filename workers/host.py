"""What an Engine needs of its station."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from toque.storage.records import Record

if TYPE_CHECKING:
    from toque.workers.attempt import Callbacks
    from toque.workers.engine import Engine
    from toque.workflow import Retention


class ChildCreation(NamedTuple):
    """A child that a step creates: the same in every repeat. `chosen`: the caller chose the id."""

    workflow: str
    id: str
    params: Any
    params_type: Any
    retention: Retention | None
    nonce: str
    parent: str  # header text
    chosen: bool


class Host(Protocol):
    """See the module. A station is one; so is a test."""

    account: str
    env: Any
    callbacks: Callbacks
    payload_max: int  # bytes of a result or an output, so that its record fits into a message
    inside: int  # callbacks of the station that have been entered and not left

    def commit(self, record: Record, engine: Engine) -> None:
        """Put a record of the engine into the pending group."""
        ...

    def now_ms(self) -> int:
        """Broker time, never ahead of it."""
        ...

    def latest_ms(self) -> int:
        """Broker time, never behind it: what a wait is counted from, so that it is never short."""
        ...

    def may_fire(self) -> bool:
        """Whether broker time is known well enough for a timer to fire (protocol rule 10)."""
        ...

    def random(self) -> float: ...

    def may_enter(self, engine: Engine) -> bool:
        """Whether it may enter a callback now: deadline, its slot, pause of the station, room in the journal."""
        ...

    def in_time(self) -> bool:
        """Whether the session's deadline lies ahead. Safe from any thread."""
        ...

    def enter_later(self, engine: Engine) -> None:
        """Call `engine.enter()` when `may_enter` may be true again."""
        ...

    def engine_rests(self, engine: Engine) -> None:
        """Nothing but far timers is left of it, or run() is not entered; no callback inside: take its slot back."""
        ...

    def engine_called(self, engine: Engine) -> None:
        """It has no slot, and something to do: an event came for it, or a control operation admitted it."""
        ...

    def before_time_out(self, engine: Engine, decide: Callable[[], None]) -> None:
        """Call `decide` when every event for it that was acknowledged before now has come (protocol rule 23)."""
        ...

    def engine_idle(self, engine: Engine) -> None:
        """Nothing of it is inside, all is accepted, and it is neither over nor at rest."""
        ...

    async def create_child(self, creation: ChildCreation) -> None:
        """Publish the creation until its outcome is known. A repeat of one that is stored is no error.

        Raises UsageError, InstanceExists, UnknownWorkflow: it will not be stored; other ToqueErrors: try again.
        """
        ...

    def engine_ended(self, engine: Engine) -> None:
        """Its terminal record is accepted."""
        ...

    def engine_left(self, engine: Engine) -> None:
        """It needs its slot no more: ended or blocked, and no callback inside."""
        ...

    def progressed(self, engine: Engine) -> int:
        """It reports progress: the number of the report, which no other one of the station has under this epoch."""
        ...

    def engine_blocked(self, engine: Engine, reason: str) -> None:
        """Its code does not fit its history; it is held until it is loaded again."""
        ...
