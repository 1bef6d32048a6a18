"""The Workflow class, retries and their delays, the step's context: what is checked where it is written."""

from __future__ import annotations

import threading
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta
from functools import partial
from random import Random
from typing import Any, Generic, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toque.errors import InvalidDuration, InvalidName, MisuseError, UsageError
from toque.workflow import (
    DEFAULT_OPTIONS,
    RETRY_LIMIT_MAX,
    Retries,
    StepContext,
    StepOptions,
    Workflow,
    WorkflowEvent,
    context_place,
    idempotency_key,
    is_runnable,
    params_type,
    pass_context,
    resolve_options,
    result_type,
    retry_delay_ms,
    workflow_name,
    workflow_version,
)

T = TypeVar("T")


class Plain(Workflow[int, str]):
    async def run(self, event, step):
        return str(event.payload)


class Named(Workflow[dict[str, int], list["Plain"]], name="the-census", version="2024.1+a"):
    async def run(self, event, step):
        return []


class Bare(Workflow):
    async def run(self, event, step):
        return None


class Shared(Workflow[T, str], Generic[T]):
    """A base for workflows, without a run of its own."""


class FromShared(Shared[bytes]):
    async def run(self, event, step):
        return ""


def context() -> StepContext:
    return StepContext(name="hash", count=1, attempt=2, idempotency_key="k", instance_id="i", workflow_name="w")


# -- the class ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("cls", "name", "version"), [
    (Plain, "Plain", "1"), (Named, "the-census", "2024.1+a"), (FromShared, "FromShared", "1"),
])
def test_name_and_version_are_given_or_have_defaults(cls, name, version):
    """The name defaults to the class's own, the version to "1"."""
    assert (workflow_name(cls), workflow_version(cls)) == (name, version)


def test_a_subclass_has_its_own_name_and_version():
    """What a parent was named says nothing of its children, or two workflows would share a name."""
    class Child(Named):
        pass

    assert (workflow_name(Child), workflow_version(Child)) == ("Child", "1")


@pytest.mark.parametrize(("cls", "params", "result"), [
    (Plain, int, str), (Named, dict[str, int], list[Plain]), (Bare, Any, Any), (Shared, Any, str),
    (FromShared, bytes, str),
])
def test_params_and_result_types_come_from_the_bases(cls, params, result):
    """Also through a generic base in between, and quoted; Any when nothing is said."""
    assert (params_type(cls), result_type(cls)) == (params, result)


def test_a_base_without_run_is_not_runnable():
    """It only serves other workflows."""
    assert is_runnable(FromShared)
    assert not is_runnable(Shared)


def test_an_illegal_name_is_refused_where_the_class_is_written():
    """The class statement fails, not the first instance."""
    with pytest.raises(InvalidName, match="workflow 'my census' has ' ' at position 2"):
        class Wrong(Workflow, name="my census"):
            pass


@pytest.mark.parametrize("version", ["", "a b", "x" * 65, "1\n", 1, None])
def test_an_illegal_version_is_refused(version):
    """A version is a short word that can be shown and compared."""
    with pytest.raises(UsageError, match=r"version is .* legal are texts of 1 to 64"):
        class Wrong(Workflow, version=version):
            pass


def test_a_run_that_is_not_async_is_refused():
    """The message shows the right form."""
    with pytest.raises(MisuseError, match=r"Wrong\.run must be written `async def run\(self, event, step\)`"):
        class Wrong(Workflow):
            def run(self, event, step):
                return None


def test_a_run_that_is_a_generator_is_refused():
    """`yield` in run() makes it something else."""
    with pytest.raises(MisuseError, match="must be written `async def run"):
        class Wrong(Workflow):
            async def run(self, event, step):
                yield 1


@pytest.mark.parametrize(("run", "names"), [
    ("async def run(self, event): ...", "self, event"), ("async def run(): ...", ""),
    ("async def run(self, event, step, x): ...", "self, event, step, x"),
])
def test_a_run_with_other_parameters_is_refused(run, names):
    """The message shows what was found."""
    namespace: dict[str, Any] = {}
    exec(run, namespace)

    with pytest.raises(MisuseError, match=rf"takes \({names}\); it must take \(self, event, step\)"):
        type("Wrong", (Workflow,), {"run": namespace["run"]})


def test_an_event_cannot_be_changed():
    """It must be the same on every replay."""
    event = WorkflowEvent(payload=1, timestamp=datetime(2024, 1, 1, tzinfo=UTC), instance_id="i", workflow_name="w")

    with pytest.raises(FrozenInstanceError):
        event.payload = 2


def test_without_a_lifespan_env_is_none():
    """`self.env` can always be read."""
    assert Plain().env is None


# -- retries -----------------------------------------------------------------------------------------------------------

def test_defaults_are_the_documented_ones():
    """Five re-tries, 10 s doubling up to 1 h, jitter, and 10 minutes for each attempt."""
    assert resolve_options(None, None) == StepOptions(5, 10_000, "exponential", 3_600_000, True, 600_000)
    assert resolve_options(Retries(), None) == DEFAULT_OPTIONS


def test_options_are_resolved_to_milliseconds():
    """What the user wrote as text or timedelta becomes a number once."""
    retries = Retries(limit=3, delay="2 seconds", backoff="linear", cap=timedelta(minutes=1), jitter=False)

    assert resolve_options(retries, "1 minute") == StepOptions(3, 2_000, "linear", 60_000, False, 60_000)


@pytest.mark.parametrize("limit", [0, RETRY_LIMIT_MAX])
def test_the_ends_of_the_retry_limit_are_legal(limit):
    """Zero means one attempt."""
    assert resolve_options(Retries(limit=limit), None).limit == limit


@pytest.mark.parametrize(("arguments", "message"), [
    ({"limit": -1}, r"Retries\.limit is -1; legal are 0 to 10,000"),
    ({"limit": RETRY_LIMIT_MAX + 1}, r"Retries\.limit is 10001"),
    ({"limit": 2.0}, r"Retries\.limit must be a whole number, not float"),
    ({"limit": True}, r"Retries\.limit must be a whole number, not bool"),
    ({"backoff": "quadratic"}, r"Retries\.backoff is 'quadratic'; legal are constant, linear, exponential"),
    ({"backoff": []}, r"Retries\.backoff is \[\]"),
    ({"jitter": "yes"}, r"Retries\.jitter must be True or False, not str"),
])
def test_wrong_retries_are_refused_where_they_are_made(arguments, message):
    """Each message names the field and what is legal."""
    with pytest.raises(UsageError, match=message):
        Retries(**arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"delay": 10}, r"Retries\.delay is the bare number 10"),
    ({"delay": "-1 s"}, r"Retries\.delay .* must be zero or more"),
    ({"cap": 60}, r"Retries\.cap is the bare number 60"),
    ({"delay": "2 hours"}, r"Retries\.cap \(1 hour\) is shorter than Retries\.delay \(2 hours\): raise cap"),
])
def test_wrong_durations_in_retries_are_refused(arguments, message):
    """A delay above the cap would be cut silently, so it is refused."""
    with pytest.raises(InvalidDuration, match=message):
        Retries(**arguments)


@pytest.mark.parametrize("timeout", [60, 0.5, "60", "0 seconds", timedelta(0), "-1 s"])
def test_a_wrong_time_out_is_refused(timeout):
    """A time-out needs a unit and is longer than nothing."""
    with pytest.raises(InvalidDuration, match="timeout is"):
        resolve_options(None, timeout)


@pytest.mark.parametrize("retries", [3, {"limit": 3}, "3"])
def test_retries_of_another_type_are_refused(retries):
    """The message shows the right form."""
    with pytest.raises(UsageError, match=rf"retries must be Retries\(limit=…, delay=…\), not {type(retries).__name__}"):
        resolve_options(retries, None)


@pytest.mark.parametrize(("backoff", "delays"), [
    ("constant", [2_000, 2_000, 2_000, 2_000, 2_000]),
    ("linear", [2_000, 4_000, 6_000, 8_000, 9_000]),
    ("exponential", [2_000, 4_000, 8_000, 9_000, 9_000]),
])
def test_delays_grow_by_their_backoff_up_to_the_cap(backoff, delays):
    """Without jitter the delays are exact."""
    options = resolve_options(Retries(delay="2 s", backoff=backoff, cap="9 s", jitter=False), None)

    assert [retry_delay_ms(options, failed, Random(1).random) for failed in range(1, 6)] == delays


@given(st.integers(1, RETRY_LIMIT_MAX + 1), st.integers(0, 10**9), st.integers(0, 10**9),
       st.sampled_from(["constant", "linear", "exponential"]), st.floats(0, 1, exclude_max=True))
def test_jitter_takes_off_up_to_a_half_and_never_adds(failed, delay_ms, above_ms, backoff, chance):
    """The cap holds with jitter, at every attempt, and a wait keeps at least a half."""
    options = StepOptions(5, delay_ms, backoff, delay_ms + above_ms, True, 1)
    exact = retry_delay_ms(options._replace(jitter=False), failed, Random(1).random)

    wait = retry_delay_ms(options, failed, lambda: chance)

    assert exact <= options.cap_ms
    assert exact / 2 <= wait <= exact


def test_jitter_spreads_delays():
    """Steps that failed together do not come back together."""
    rng = Random(3)

    delays = {retry_delay_ms(DEFAULT_OPTIONS, 1, rng.random) for _ in range(100)}

    assert len(delays) > 90


# -- the step's context ------------------------------------------------------------------------------------------------

def test_a_context_learns_from_another_thread_that_it_is_cancelled():
    """A sync callback's thread sees the flag that the Engine's thread sets."""
    ctx = context()
    assert not ctx.cancelled

    thread = threading.Thread(target=ctx._cancel)
    thread.start()
    thread.join()

    assert ctx.cancelled


def test_a_context_has_no_room_for_more():
    """A misspelt attribute is an error, and `cancelled` is not the user's to set."""
    ctx = context()

    with pytest.raises(AttributeError):
        ctx.canceled = True
    with pytest.raises(AttributeError):
        ctx.cancelled = True


IDENTITY = {"account": "main", "workflow": "w", "instance_id": "i", "run": 1, "kind": "do", "name": "a",
            "occurrence": 1}


def test_an_idempotency_key_is_stable():
    """It is sent to other systems, so it must not change with a release."""
    assert idempotency_key(**IDENTITY) == "6279401d585403fc11f25d2fd85cbd13"


@pytest.mark.parametrize("change", [
    {"account": "b"}, {"workflow": "b"}, {"instance_id": "b"}, {"run": 2}, {"kind": "sleep"}, {"name": "b"},
    {"occurrence": 2}, {"run": 11, "name": ""}, {"workflow": "", "instance_id": "wi"},
])
def test_idempotency_keys_of_different_steps_differ(change):
    """Each part of the identity counts, and parts do not run into each other."""
    assert idempotency_key(**(IDENTITY | change)) != idempotency_key(**IDENTITY)


def ctx_first(ctx, a, b=2): return ctx, a, b
def ctx_second(a, ctx, b=2): return ctx, a, b
def ctx_last(a, b=2, ctx=None): return ctx, a, b
def ctx_keyword(a, b=2, *, ctx): return ctx, a, b
async def ctx_async(ctx, a, b=2): return ctx, a, b


class Holder:
    def method(self, ctx, a, b=2): return ctx, a, b
    def __call__(self, a, *, ctx, b=2): return ctx, a, b


@pytest.mark.parametrize("fn", [
    ctx_first, ctx_second, ctx_last, ctx_keyword, Holder().method, Holder(), partial(ctx_second, b=2),
    partial(ctx_keyword), lambda ctx, a, b=2: (ctx, a, b),
])
@pytest.mark.parametrize(("args", "kwargs"), [((1,), {}), ((), {"a": 1})])
def test_the_context_gets_to_the_parameter_named_ctx(fn, args, kwargs):
    """In any position, with the other arguments around it, positional or by keyword."""
    ctx = context()

    passed_args, passed_kwargs = pass_context(fn, args, kwargs, ctx)

    assert fn(*passed_args, **passed_kwargs) == (ctx, 1, 2)


@pytest.mark.parametrize("fn", [lambda: 1, len, print, partial(int, "1"), Holder, dict, StepContext])
def test_a_callable_without_ctx_gets_no_context(fn):
    """Arguments pass unchanged, also of builtins without a signature."""
    assert context_place(fn) is None
    assert pass_context(fn, (1,), {"b": 2}, context()) == ((1,), {"b": 2})


def test_a_local_variable_named_ctx_is_no_parameter():
    """Only what the caller can pass counts."""
    def callback(a):
        ctx = a
        return ctx

    assert context_place(callback) is None


@pytest.mark.parametrize("steps", [0, -1, 1_000_001, "5", True])
def test_an_illegal_number_of_steps_is_refused_where_the_class_is_written(steps):
    """With the bounds."""
    with pytest.raises(UsageError, match="from 1 to 1,000,000"):
        type("Flow", (Workflow,), {}, steps_max=steps)
