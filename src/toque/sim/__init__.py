"""The simulator: virtual time on a seeded asyncio loop. The buses and stores it runs on are in `toque.storage`."""

from toque.sim.loop import Deadlock, VirtualClock, VirtualLoop, run

__all__ = ["Deadlock", "VirtualClock", "VirtualLoop", "run"]
