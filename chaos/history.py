"""The client's own log: what it asked for, and what it was told, with the times of both (`ops.jsonl`).

Together with the ledger it is all that the checkers judge from. Times are CLOCK_MONOTONIC in nanoseconds, so on one
machine they compare with the ledger's. An operation is written twice, when it is invoked and when it returns; one that
never returned stays `unknown`: it may have happened or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from toque.errors import InstanceFailed, LostRace, UsageError

OK, FAILED, UNKNOWN = "ok", "failed", "unknown"
CREATE, RESULT, STATUS = "create", "result", "status"
COMPLETE = "complete"

_ANSWERS_FOR_SURE = (LostRace, UsageError)


class Op(msgspec.Struct, omit_defaults=True):
    """One operation of the client on one instance."""

    number: int
    op: str  # create | result | status
    workflow: str = ""
    instance: str = ""
    invoked_ns: int = 0
    returned_ns: int = 0  # 0: never returned
    outcome: str = UNKNOWN  # ok | failed (it did not happen, for sure) | unknown
    status: str = ""  # of result and status: what the client was told
    value: str = ""  # of result: the output, or a digest of it; of failed and unknown: why


class OpLog:
    """Logs operations: `write` gets each one when it is invoked, and again when it has returned."""

    def __init__(self, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._last = 0

    def write(self, op: Op) -> None:
        """Keep what is known of the operation now."""
        raise NotImplementedError

    def invoke(self, op: str, workflow: str = "", instance: str = "") -> Op:
        """The operation is about to be sent."""
        self._last += 1
        invoked = Op(self._last, op, workflow, instance, self._clock())
        self.write(invoked)
        return invoked

    def ok(self, op: Op, *, instance: str = "", status: str = "", value: str = "") -> None:
        """It was acknowledged. `instance` names the id where the call itself made it."""
        op.instance = instance or op.instance
        self._returned(op, OK, status, value)

    def failed(self, op: Op, reason: str) -> None:
        """It was refused: it did not happen."""
        self._returned(op, FAILED, "", reason)

    def unknown(self, op: Op, reason: str) -> None:
        """Nobody knows whether it happened."""
        self._returned(op, UNKNOWN, "", reason)

    @contextmanager
    def recording(self, op: str, workflow: str = "", instance: str = "") -> Iterator[Op]:
        """Log the body as one operation; set `status` and `value` of the Op in it. Exceptions go on."""
        invoked = self.invoke(op, workflow, instance)
        try:
            yield invoked
        except _ANSWERS_FOR_SURE as exc:
            self.failed(invoked, repr(exc))
            raise
        except InstanceFailed as exc:
            self.ok(invoked, status=type(exc).__name__.removeprefix("Instance").lower(), value=str(exc))
            raise
        except BaseException as exc:
            self.unknown(invoked, repr(exc))
            raise
        self.ok(invoked, status=invoked.status, value=invoked.value)

    def _returned(self, op: Op, outcome: str, status: str, value: str) -> None:
        op.returned_ns, op.outcome, op.status, op.value = self._clock(), outcome, status, value
        self.write(op)


class History(OpLog):
    """Writes the log. Every line is written out at once, so a killed client leaves what it knew."""

    def __init__(self, path: Path, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__(clock=clock)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._encoder = msgspec.json.Encoder()

    def write(self, op: Op) -> None:
        self._file.write(self._encoder.encode(op) + b"\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_history(path: Path) -> list[Op]:
    """Every operation of the log in order of invocation, as it was last written; a torn last line is left out."""
    decoder = msgspec.json.Decoder(Op)
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    latest: dict[int, Op] = {}
    for line in whole.splitlines():
        op = decoder.decode(line)
        latest[op.number] = op
    return list(latest.values())
