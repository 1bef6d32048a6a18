"""What run() came to: the status, output and failure of the terminal record. Pure."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any, NamedTuple

from toque._payload import decode, describe_exception, encode
from toque.errors import MisuseError
from toque.storage import records as r
from toque.workers.instance_loop import explain
from toque.workers.replay import describe_calls
from toque.workers.step_call import StepCall, StepDecorator
from toque.workflow import Workflow, result_type


class RunEnd(NamedTuple):
    """The terminal record's part that run() decides."""

    status: r.Status
    output: bytes = b""
    failure: r.Failure | None = None


def errored(failure: r.Failure) -> RunEnd:
    return RunEnd(r.Status.ERRORED, failure=failure)


def run_end(main: asyncio.Task[Any], flow: type[Workflow[Any, Any]], *, title: str, limit: int,
            still_open: Collection[StepCall], unawaited: Collection[StepCall | StepDecorator]) -> RunEnd:
    """`main` is done. The output is encoded, and decoded once as who asks for it does."""
    if main.cancelled():
        return errored(r.Failure("CancelledError", "run() was cancelled from inside"))
    if (error := main.exception()) is not None:
        return errored(describe_exception(explain(error)))
    try:
        _check_closed(still_open, unawaited)
        output = encode(main.result(), what=f"the result of {title}", limit=limit)
        decode(output, result_type(flow), what=f"the result of {title}")
    except Exception as failure:  # encoders are user code, too  # noqa: BLE001
        return errored(describe_exception(failure))
    return RunEnd(r.Status.COMPLETE, output)


def _check_closed(still_open: Collection[StepCall], unawaited: Collection[StepCall | StepDecorator]) -> None:
    if still_open:
        raise MisuseError(f"run() returned with steps open: {describe_calls(still_open)}. Await every step before "
                          f"returning, or cancel it")
    if unawaited:
        raise MisuseError(f"run() never awaited {describe_calls(unawaited)}. Write `await step.do(\"name\", fn)`")
