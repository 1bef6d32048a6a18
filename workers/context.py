"""What the parts of one pod share. Made once by the pod; `session` changes when a lost one is followed by another."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toque.storage.journal import Journal
from toque.storage.ports import Bus, Clock, Store
from toque.storage.snapshots import SnapshotObjects
from toque.workers.attempt import Callbacks
from toque.workers.broker_time import BrokerTime
from toque.workers.control import ControlWatch
from toque.workers.session import Session
from toque.workers.slots import Slots

if TYPE_CHECKING:
    from toque._app import App


@dataclass
class PodContext:
    """One pod's ports and shared state."""

    pod: str
    account: str
    app: App
    bus: Bus
    store: Store
    clock: Clock
    rng: random.Random
    journal: Journal
    snapshots: SnapshotObjects
    broker_time: BrokerTime
    session: Session
    slots: Slots
    callbacks: Callbacks
    control: ControlWatch
    env: Any = None
    started_at: int = 0

    def may_start(self) -> bool:
        """Whether instances may be admitted or woken now."""
        return self.session.in_time() and self.broker_time.ready and not self.journal.trouble
