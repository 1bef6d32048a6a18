"""Promises about accounts: made once whatever happens, read from the leader, changed only within bounds."""

from __future__ import annotations

import asyncio
import random

import pytest

from toque import _subjects, sim
from toque._accounts import (
    Accounts,
    ensure_account,
    ensure_queue_stream,
    list_accounts,
    queue_capacity,
    queue_workflows,
    read_account,
    read_layout,
    update_account,
)
from toque._protocol import AccountRecord, Layout, encode
from toque.errors import BrokerUnavailable, InvalidName, SetupError, UsageError
from toque.storage.memory_bus import MemoryBroker, MemoryBus

WRITES = ("$JS.API.STREAM.CREATE.>", "toque.main.control.account", "toque.main.control.layout")


def new_bus() -> MemoryBus:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, sim.VirtualLoop)
    return MemoryBus(MemoryBroker(loop.rng))


def test_an_account_is_made_with_its_streams_and_both_records():
    """After ensure_account the control, journal and dead streams and the two records are there."""

    async def main():
        bus = new_bus()

        account, layout = await ensure_account(bus, "main")

        assert await bus.list_streams("toque+") == [
            "toque+main+control", "toque+main+dead", "toque+main+events", "toque+main+journal", "toque+main+snapshots"]
        assert await read_account(bus, "main") == account == AccountRecord(name="main")
        assert await read_layout(bus, "main") == layout == Layout(generations=[(1, 8)])

    sim.run(main(), seed=1)


def test_the_journal_never_discards_and_the_control_bucket_replaces():
    """The two streams that hold the truth are configured so that nothing acknowledged vanishes from them."""

    async def main():
        bus = new_bus()
        await ensure_account(bus, "main")

        journal = (await bus.stream_info("toque+main+journal")).config
        control = (await bus.stream_info("toque+main+control")).config

        limits = [journal.get(name, -1) for name in ("max_msgs", "max_bytes", "max_msgs_per_subject")]
        assert journal["discard"] == "new"
        assert limits == [-1, -1, -1] and not journal.get("max_age")
        assert (control["max_msgs_per_subject"], control.get("discard", "old")) == (1, "old")
        assert control["allow_msg_ttl"] and control["subject_delete_marker_ttl"] == 3600 * 10**9

    sim.run(main(), seed=1)


@pytest.mark.parametrize("seed", range(10))
def test_accounts_made_by_several_at_once_are_one(seed):
    """Racing creators with other settings all get the same record, layout and number of stations."""

    async def main():
        broker = MemoryBroker(random.Random(seed))
        wanted = [AccountRecord(name="main", stations=1 + n, replicas=1 + 2 * (n % 2)) for n in range(4)]

        made = await asyncio.gather(*(ensure_account(MemoryBus(broker), "main", defaults=one) for one in wanted))

        assert len({(repr(account), repr(layout)) for account, layout in made}) == 1
        account, layout = made[0]
        assert layout.generations == [(1, account.stations)]
        for stream in await MemoryBus(broker).list_streams("toque+"):
            assert (await MemoryBus(broker).stream_info(stream)).config["num_replicas"] == account.replicas

    sim.run(main(), seed=seed)


@pytest.mark.parametrize("lost", WRITES)
@pytest.mark.parametrize("how", ["drop before", "execute then lose the answer"])
def test_an_account_cut_at_any_write_is_finished_by_the_next_one(lost, how):
    """Whether a write was lost or only its answer: the same call again completes the account."""

    async def main():
        bus = new_bus()
        bus.broker.fail_next(lost, how)
        with pytest.raises(BrokerUnavailable):
            await ensure_account(bus, "main")

        await ensure_account(bus, "main")

        assert len(await bus.list_streams("toque+main+")) == 5
        assert (await read_layout(bus, "main")).generations == [(1, 8)]

    sim.run(main(), seed=2)


def test_an_existing_account_keeps_its_settings():
    """Defaults count only for an account that is not there yet."""

    async def main():
        bus = new_bus()
        await ensure_account(bus, "main", defaults=AccountRecord(name="main", stations=3))

        account, layout = await ensure_account(bus, "main", defaults=AccountRecord(name="main", stations=5))

        assert account.stations == 3
        assert layout.generations == [(1, 3)]

    sim.run(main(), seed=1)


@pytest.mark.parametrize("key", ["account", "layout"])
def test_a_record_of_a_newer_format_is_refused(key):
    """A format that this version does not know is an error that says so, and is not written over."""

    async def main():
        bus = new_bus()
        await ensure_account(bus, "main")
        newer = b'{"format": 2, "name": ["not", "text"], "generations": "elsewhere"}'
        await bus.publish(f"toque.main.control.{key}", newer)

        with pytest.raises(SetupError, match="format 2"):
            await ensure_account(bus, "main")

        message = await bus.last_message("toque+main+control", f"toque.main.control.{key}")
        assert message is not None and message.data == newer

    sim.run(main(), seed=1)


def test_an_account_that_is_not_there_is_said_so():
    """Reading an unknown account names it and says how to make it."""

    async def main():
        bus = new_bus()

        with pytest.raises(SetupError, match="toque accounts create nobody"):
            await read_account(bus, "nobody")
        with pytest.raises(SetupError, match="nobody"):
            await update_account(bus, "nobody", queue_limit=5)

    sim.run(main(), seed=1)


def test_illegal_account_names_make_nothing():
    """A name that is no subject token is refused before anything is written."""

    async def main():
        bus = new_bus()

        with pytest.raises(InvalidName):
            await ensure_account(bus, "a.b")

        assert await bus.list_streams("") == []

    sim.run(main(), seed=1)


def test_a_queue_stream_takes_plain_creations_and_refuses_a_second_of_an_id():
    """A plain publish lands under its station's subject; the same id again is refused as a duplicate."""

    async def main():
        bus = new_bus()
        account, layout = await ensure_account(bus, "main")
        await ensure_queue_stream(bus, account, layout, "census")

        await bus.publish("toque.main.create.census.one", b"{}")
        stored = await bus.message_at("toque+main+queue+census", 1)

        assert stored is not None
        assert stored.subject == f"toque.main.queue.census.1.{_subjects.station_number('one', 8)}.one"
        with pytest.raises(Exception, match="maximum messages per subject"):
            await bus.publish("toque.main.create.census.one", b"{}")

    sim.run(main(), seed=1)


def test_a_queue_stream_is_made_once_and_keeps_its_messages():
    """Every pod may ensure the stream again and again."""

    async def main():
        bus = new_bus()
        account, layout = await ensure_account(bus, "main")
        await ensure_queue_stream(bus, account, layout, "census")
        await bus.publish("toque.main.create.census.one", b"{}")

        await asyncio.gather(*(ensure_queue_stream(bus, account, layout, "census") for _ in range(3)))

        assert (await bus.stream_info("toque+main+queue+census")).messages == 1
        assert await queue_workflows(bus, "main") == ["census"]

    sim.run(main(), seed=1)


def test_a_new_queue_limit_reaches_the_streams():
    """update_account changes the record and every queue stream's bound, and leaves the transform alone."""

    async def main():
        bus = new_bus()
        account, layout = await ensure_account(bus, "main")
        for workflow in ("census", "report"):
            await ensure_queue_stream(bus, account, layout, workflow)

        changed = await update_account(bus, "main", queue_limit=1000)

        assert changed.queue_limit == (await read_account(bus, "main")).queue_limit == 1000
        for workflow in ("census", "report"):
            config = (await bus.stream_info(f"toque+main+queue+{workflow}")).config
            assert config["max_msgs"] == queue_capacity(1000) == 1050
            assert "partition(8,1)" in config["subject_transform"]["dest"]

    sim.run(main(), seed=1)


def test_a_limit_change_cut_before_the_streams_is_finished_by_the_next_pod():
    """The record says what holds: a pod with an older record in hand brings its stream after the newer one."""

    async def main():
        bus = new_bus()
        account, layout = await ensure_account(bus, "main")
        await ensure_queue_stream(bus, account, layout, "census")
        bus.broker.fail_next("$JS.API.STREAM.UPDATE.>", "drop before")
        with pytest.raises(BrokerUnavailable):
            await update_account(bus, "main", queue_limit=1000)
        newer = await read_account(bus, "main")

        await ensure_queue_stream(bus, newer, layout, "census")
        await ensure_queue_stream(bus, account, layout, "census")

        assert (await bus.stream_info("toque+main+queue+census")).config["max_msgs"] == queue_capacity(1000)

    sim.run(main(), seed=1)


@pytest.mark.parametrize("seed", range(5))
def test_changes_made_at_once_all_stand(seed):
    """Two changers of different settings do not undo each other."""

    async def main():
        broker = MemoryBroker(random.Random(seed))
        await ensure_account(MemoryBus(broker), "main")

        await asyncio.gather(update_account(MemoryBus(broker), "main", queue_limit=10),
                             update_account(MemoryBus(broker), "main", max_concurrent=20),
                             update_account(MemoryBus(broker), "main", ttl_s=30))

        account = await read_account(MemoryBus(broker), "main")
        assert (account.queue_limit, account.max_concurrent, account.ttl_s) == (10, 20, 30)

    sim.run(main(), seed=seed)


@pytest.mark.parametrize(("changes", "said"), [
    ({"queue_limit": 0}, "between 1 and"), ({"queue_limit": "5"}, "whole number"), ({"ttl_s": float("nan")}, "ttl_s"),
    ({"max_concurrent": True}, "whole number"), ({"stations": 9}, "8 stations"), ({"colour": 1}, "no setting 'colour'"),
    ({"replicas": 2}, "1, 3 or 5"), ({"start_rate": -1}, "start_rate"), ({"name": "other"}, "no setting 'name'"),
])
def test_illegal_settings_change_nothing(changes, said):
    """Each illegal setting is named in the error, and the record stays as it was."""

    async def main():
        bus = new_bus()
        account, _ = await ensure_account(bus, "main")

        with pytest.raises(UsageError, match=said):
            await update_account(bus, "main", **changes)

        assert await read_account(bus, "main") == account

    sim.run(main(), seed=1)


def test_accounts_are_listed_by_name_and_only_ours():
    """Streams of others on the same server are no accounts."""

    async def main():
        bus = new_bus()
        await ensure_account(bus, "zebra")
        await ensure_account(bus, "ant")

        assert [account.name for account in await list_accounts(bus)] == ["ant", "zebra"]

    sim.run(main(), seed=1)


def test_creating_an_account_again_is_harmless_but_never_changes_it():
    """`accounts create` may be repeated; with other settings it says to use `set`."""

    async def main():
        accounts = Accounts(new_bus())
        first = await accounts.create("main", stations=2, queue_limit=7)

        assert await accounts.create("main", stations=2, queue_limit=7) == first
        with pytest.raises(UsageError, match="toque accounts set main"):
            await accounts.create("main", queue_limit=8)
        assert await accounts.describe("main") == first

    sim.run(main(), seed=1)


def test_control_records_are_readable_json():
    """People see the records in any NATS tool."""
    assert encode(AccountRecord(name="main"), json=True) == b'{"name":"main"}'
