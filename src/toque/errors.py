"""Every error Toque raises, in one tree.

ToqueError
├── UsageError                a caller's mistake: fix the call, nothing was changed
│   ├── InvalidName           an account, workflow, instance or step name of no legal form
│   ├── InvalidDuration       a bare number, an unknown unit, a negative or endless time
│   ├── InvalidPayload        a value that cannot be encoded, or does not fit its type
│   ├── PayloadTooLarge       more than 1 MiB (or than the server takes)
│   ├── AppError              an APP that cannot be imported, or holds no workflow
│   ├── TooManySteps          run() has begun more steps than its workflow allows
│   └── MisuseError           a step inside a callback, a foreign await in run(), a step left open …
├── LostRace                  somebody else was first, or it is already over
│   ├── InstanceExists        the id belongs to another creation
│   │   └── TwiceInBatch      create_batch: an item before has the same id
│   ├── StepNotFound          restart(from_=…): the history has no such step
│   ├── InstanceNotFound      an owner said so: no instance of this id
│   ├── InstanceEnded         the operation needs a live instance
│   ├── EventRefused          the instance holds as many events as it may that nothing has waited for
│   └── NotParked             no message is parked under this sequence (any more)
├── Unavailable               nothing is known to be wrong with the call (or a lifespan raised): try again
│   ├── OwnerAway             no pod answers for the station; says what is known
│   ├── BrokerUnavailable     no connection, a time-out (outcome unknown), a write-dead stream
│   ├── ResultTimeout         result(): not ended within the time-out; it goes on
│   ├── QueueFull             the workflow's queue limit is reached; nothing was stored
│   └── TooManyWatchers       the station answers no more watchers at once
├── UnknownWorkflow           no queue stream: no pod has ever served this workflow here
├── SetupError                server or directory not fit for use: no JetStream, too old, lazy fsync, wrong owner
├── InstanceFailed            result() of an instance that ended without one
│   ├── InstanceErrored       run() raised, or the creation did not fit
│   └── InstanceTerminated    somebody terminated it
├── StepError                 raised inside run() where a step was awaited
│   ├── StepFailed            the last attempt raised; carries type, message, traceback text
│   ├── StepTimeout           the last attempt took longer than its time-out
│   ├── EventTimeout          no event came within the time-out of a wait
│   └── ChildFailed           the child of run_workflow errored or was terminated
├── NonRetryableError         raised by user code in a callback: no more attempts
└── DeterminismError          replay met another step than the journal holds

Callers act differently on a mistake, on a lost race and on a broken server: those are the branches.
"""

from __future__ import annotations

from typing import Any


class ToqueError(Exception):
    """Root of every error that Toque raises on purpose."""


class UsageError(ToqueError):
    """The call itself is wrong; nothing was changed. The message says what to do instead."""


class InvalidName(UsageError):
    """A name that has no legal form. `kind` says of what, `name` is the offending text."""

    def __init__(self, message: str, *, kind: str, name: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.name = name


class InvalidDuration(UsageError):
    """A duration that is not a `timedelta` nor a text such as "5 seconds"."""


class InvalidPayload(UsageError):
    """A value that cannot be encoded, or that does not fit the annotated type."""


class PayloadTooLarge(UsageError):
    """An encoded value of `size` bytes where `limit` bytes are taken."""

    def __init__(self, message: str, *, size: int, limit: int) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class AppError(UsageError):
    """The APP of `toque dev` or `toque worker` cannot be imported or holds no workflow."""


class MisuseError(UsageError):
    """A rule of run() and callbacks was broken; the message names the step and the remedy."""


class TooManySteps(UsageError):
    """run() has begun more steps than its workflow allows (`steps_max`); sleeps do not count."""


class LostRace(ToqueError):
    """Somebody else was first, or it is already over. Asking again gives the same answer."""


class InstanceExists(LostRace):
    """An instance of this id exists from another creation (Cloudflare's code 10405)."""

    code = 10405


class TwiceInBatch(InstanceExists):
    """An item that stands earlier in the same batch has this id (Cloudflare's code 10415)."""

    code = 10415


class InstanceNotFound(LostRace):
    """The owner of the id's station says that there is no such instance (Cloudflare's code 10400)."""

    code = 10400


class InstanceEnded(LostRace):
    """The instance has ended already; the operation needs a live one."""


class EventRefused(LostRace):
    """The instance holds 10,000 events already that it has not waited for; nothing was kept of this one."""


class NotParked(LostRace):
    """No message is parked under this sequence: it was retried or dropped, or its time was over."""


class Unavailable(ToqueError):
    """The call may be fine; something it needs does not answer. Try again.

    `handle` is the instance's handle where one is known, so that the caller can ask again.
    """

    def __init__(self, message: str, *, handle: Any = None) -> None:
        super().__init__(message)
        self.handle = handle


class OwnerAway(Unavailable):
    """No pod answered for the instance's station within the time-out."""


class BrokerUnavailable(Unavailable):
    """No connection, or no answer in time: the outcome of a write is unknown (it may have been stored)."""


class ResultTimeout(Unavailable, TimeoutError):
    """The instance has not ended within the time-out of `result()`. It goes on; ask again."""


class QueueFull(Unavailable):
    """The workflow's queue limit is reached. Nothing was stored; try again later."""


class TooManyWatchers(Unavailable):
    """The owner holds back answers for as many watchers as it can. Go on from the last cursor later."""


class UnknownWorkflow(ToqueError):
    """No queue stream of this workflow exists in the account: no pod has served it yet."""


class SetupError(ToqueError):
    """The server, or a data directory, is not fit for use; the message says how to mend it."""


class StepNotFound(LostRace):
    """The history of the instance has no such step."""


class InstanceFailed(ToqueError):
    """The instance ended without a result."""


class InstanceErrored(InstanceFailed):
    """run() raised. `error_type`, `error_message` and `traceback` are what was recorded of it."""

    def __init__(self, error_type: str, error_message: str, traceback: str = "") -> None:
        super().__init__(f"{error_type}: {error_message}" if error_message else error_type)
        self.error_type = error_type
        self.error_message = error_message
        self.traceback = traceback


class InstanceTerminated(InstanceFailed):
    """The instance was terminated."""


class StepError(ToqueError):
    """A step has failed for good. Raised where run() awaits it; the same on every replay."""

    def __init__(self, message: str, *, step: str, error_type: str, error_message: str, attempts: int,
                 traceback: str = "") -> None:
        super().__init__(message)
        self.step = step
        self.error_type = error_type
        self.error_message = error_message
        self.attempts = attempts
        self.traceback = traceback


class StepFailed(StepError):
    """The callback's last attempt raised. `error_type` is the exception's type name."""


class StepTimeout(StepError):
    """The callback's last attempt took longer than its time-out."""


class EventTimeout(StepError):
    """No event of the type came within the time-out of the wait. Later waits of the type can still get one."""


class ChildFailed(StepError):
    """The child errored, or was terminated (`error_type` is "Terminated" then). `child` is "<workflow>/<id>"."""

    def __init__(self, message: str, *, step: str, error_type: str, error_message: str, attempts: int,
                 traceback: str = "", child: str = "") -> None:
        super().__init__(message, step=step, error_type=error_type, error_message=error_message, attempts=attempts,
                         traceback=traceback)
        self.child = child


class NonRetryableError(ToqueError):
    """Raise this in a callback: the step fails at once, without more attempts."""


class DeterminismError(ToqueError):
    """Replay met another step than the journal holds: the code has changed under a live instance."""

    def __init__(self, message: str, *, expected: str, found: str) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found
