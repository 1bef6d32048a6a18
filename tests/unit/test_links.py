"""Links between pods and the server, on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from toque.chaos.links import Link, Manner, Way

DELAY_S = 0.2


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Link, asyncio.StreamReader, asyncio.StreamWriter, str]]:
    """An echo server, a link to it, and a connection through the link."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    link = Link("127.0.0.1", server.sockets[0].getsockname()[1])
    url = await link.open()
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
    try:
        yield link, reader, writer, url
    finally:
        writer.close()
        await link.close()
        server.close()


async def said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes) -> float:
    """Seconds until it has come back."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    writer.write(text)
    assert await reader.readexactly(len(text)) == text
    return loop.time() - began


def test_a_link_hands_everything_on(run_async):
    """In both directions, in order."""

    async def scenario() -> None:
        async with linked() as (link, reader, writer, _):
            await said(reader, writer, b"x" * 100_000)
            assert link.connections == 1

    run_async(scenario())


def test_a_slow_link_delays_each_byte_both_ways(run_async):
    """And none any more once it is healed."""

    async def scenario() -> None:
        async with linked() as (link, reader, writer, _):
            link.set(Manner(Way.DELAY, delay_s=DELAY_S))
            assert await said(reader, writer, b"slow") >= 2 * DELAY_S
            link.set(Manner())
            assert await said(reader, writer, b"fast") < 2 * DELAY_S

    run_async(scenario())


def test_a_dripping_link_bounds_the_bytes_per_second(run_async):
    """So many bytes take so long."""

    async def scenario() -> None:
        async with linked() as (link, reader, writer, _):
            link.set(Manner(Way.DRIP, bytes_per_s=5_000))
            assert await said(reader, writer, b"x" * 2_000) >= 0.3

    run_async(scenario())


def test_a_cut_link_resets_what_is_there_and_refuses_the_next(run_async):
    """As a broken cable whose other end answers for it."""

    async def scenario() -> None:
        async with linked() as (link, reader, writer, url):
            await said(reader, writer, b"hello")
            link.set(Manner(Way.CUT))
            with pytest.raises(OSError):
                await reader.readexactly(1)
            again, refused = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await again.readexactly(1)
            refused.close()
            assert link.resets

    run_async(scenario())


def test_a_half_open_link_keeps_what_is_sent_until_it_is_healed(run_async):
    """Nobody sees an error; nothing comes; then everything does."""

    async def scenario() -> None:
        async with linked() as (link, reader, writer, _):
            link.set(Manner(Way.HALF_OPEN))
            writer.write(b"kept")
            answer = asyncio.ensure_future(reader.readexactly(4))
            done, _pending = await asyncio.wait([answer], timeout=DELAY_S)
            assert not done
            link.set(Manner())
            assert await answer == b"kept"

    run_async(scenario())
