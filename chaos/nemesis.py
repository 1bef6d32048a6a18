"""Carries out a schedule of faults, one after the other, each once the work has recovered from the one before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from toque.chaos.faults import CUTTING_OFF, DEADLY, OF_SERVER, Fault
from toque.chaos.strikes import BACK_S_MAX, STRIKES, Hands, Injected
from toque.chaos.topology import PodSeen
from toque.errors import Unavailable

POLL_S = 0.05
LOST_TTLS = 1.3  # a pod that was cut off for so long has lost its session, though it may not know it yet
STUCK_S_MAX = 60.0  # without enough callbacks being left: the work does not go on, so no more faults


class Nemesis:
    """The faults of one run. `injected` grows; a fault that could not be made says why in `missed`.

    With `every_s` they come by the clock, else after as much work as each of them says.
    """

    def __init__(self, faults: Sequence[Fault], hands: Hands, say: Callable[[str], None], *,
                 every_s: float = 0.0) -> None:
        self.faults = faults
        self._every_s = every_s
        self.injected: list[Injected] = []
        self.missed: list[str] = []
        self._hands = hands
        self._say = say

    async def run(self) -> None:
        """Make every fault. Ends early when the work does not go on: the checks say what that means."""
        try:
            for fault in self.faults:
                began = time.monotonic()
                if not self._every_s:
                    await self._until_left(fault.after)
                await self._strike(fault)
                await asyncio.sleep(max(0.0, began + self._every_s - time.monotonic()))
        except Unavailable as error:
            self.missed.append(str(error))
            self._say(f"no more faults: {error}")

    async def _until_left(self, callbacks: int) -> None:
        progress = self._hands.progress
        goal = progress.read().left + callbacks
        deadline = time.monotonic() + STUCK_S_MAX
        while progress.read().left < goal:
            if time.monotonic() > deadline:
                raise Unavailable(f"{callbacks} callbacks were not left within {STUCK_S_MAX:g} s")
            await asyncio.sleep(POLL_S)

    async def _strike(self, fault: Fault) -> None:
        pods = await self._hands.topology.living()
        victim = _victim(fault, pods)
        out = Injected(fault, held_by_others=sum(pod.slots_leased for pod in pods if pod is not victim))
        if fault.kind not in OF_SERVER:
            self._hands.topology.check_pod(victim)
            out.pod, out.pid, out.session, out.stations = victim.pod, victim.pid, victim.session, victim.stations
        who = f"{victim.pod}, process {victim.pid}" if out.pod else "nats-server"
        self._say(f"fault {fault.number + 1} of {len(self.faults)}: {fault} → {who}")
        try:
            await STRIKES[fault.kind](fault, victim, out, self._hands)
        finally:
            if out.ended_ns:
                self.injected.append(out)
        if not out.ended_ns:
            self.missed.append(f"fault {fault.number + 1}, {fault}, had no effect on {who}")
            return
        await self._recovered(out)

    async def _recovered(self, out: Injected) -> None:
        """Wait until what the fault hit goes on; not for ever."""
        began = time.monotonic()
        if out.fault.kind in DEADLY:
            while self._hands.progress.read().waits_for(out.pid) and time.monotonic() < began + BACK_S_MAX:
                await asyncio.sleep(POLL_S)
            self._say(f"  what was with it goes on elsewhere after {time.monotonic() - began:.2f} s")
        elif out.pod:
            must_differ = out.fault.kind in CUTTING_OFF and out.lasted_s > LOST_TTLS * self._hands.topology.ttl_s
            back = await self._hands.topology.until_back(out.pod, BACK_S_MAX, not_as=out.session if must_differ else "")
            out.session_after = back.session if back else ""
            how = "under another session" if out.lost_session else "under the same session"
            self._say(f"  {out.pod} serves again {how}" if back else f"  {out.pod} has no stations yet")


def _victim(fault: Fault, pods: Sequence[PodSeen]) -> PodSeen:
    if fault.owner_of_zero:
        return next(pod for pod in pods if pod.owns_zero)
    return sorted(pods, key=lambda pod: pod.pod)[int(fault.choice * len(pods))]
