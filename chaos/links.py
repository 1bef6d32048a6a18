"""A way between a pod and the server that can be made slow or cut: a TCP proxy of our own, no root needed.

Each pod gets a link of its own. What a fault does is set for the whole link, and holds for the connections that are
there and for those that come: a cut link refuses, a half-open one accepts and says nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from dataclasses import dataclass
from enum import StrEnum

CHUNK_BYTES = 16 * 1024
CONNECT_S_MAX = 5.0
DRIP_S = 0.02  # between two drops
BACKLOG_CHUNKS_MAX = 64  # of one direction that wait for their time; then the sender feels it


class Way(StrEnum):
    """What a link does with bytes."""

    PASS = "pass"
    DELAY = "delay"  # each byte arrives later
    DRIP = "drip"  # so many bytes a second
    CUT = "cut"  # connections are reset, new ones refused
    HALF_OPEN = "half-open"  # connections stay and are accepted; no byte goes through


@dataclass(frozen=True)
class Manner:
    """How a link treats what goes through it."""

    way: Way = Way.PASS
    delay_s: float = 0.0
    bytes_per_s: int = 0


class Link:
    """A listener on loopback that hands on to the server. `set` makes and heals faults."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._manner = Manner()
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.connections = 0  # ever accepted and handed on
        self.resets = 0

    async def open(self) -> str:
        """Listen; returns the URL for the pod."""
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0, limit=CHUNK_BYTES)
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def set(self, manner: Manner) -> None:
        """From now on. A cut resets what is there."""
        self._manner = manner
        self._changed.set()
        self._changed = asyncio.Event()
        if manner.way is Way.CUT:
            for writer in list(self._writers):
                self.resets += 1
                _reset(writer)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- connections ---------------------------------------------------------------------------------------------------

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self._manner.way is Way.CUT:
                _reset(writer)
                return
            await self._until_open()
            async with asyncio.timeout(CONNECT_S_MAX):
                there, back = await asyncio.open_connection(*self._target, limit=CHUNK_BYTES)
            self.connections += 1
            await self._hand_on_both(reader, writer, there, back)
        except (OSError, TimeoutError):  # the server is away: the pod sees its connection end
            return
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _hand_on_both(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
                            there: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        self._writers.add(back)
        ways = [asyncio.ensure_future(self._hand_on(reader, back)), asyncio.ensure_future(self._hand_on(there, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._writers.discard(back)
            back.transport.abort()

    async def _hand_on(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """One direction: one side reads and notes the time, the other sends what is due."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(BACKLOG_CHUNKS_MAX)
        sending = asyncio.ensure_future(self._send(waiting, target))
        try:
            with contextlib.suppress(OSError):
                while data := await source.read(CHUNK_BYTES):
                    await waiting.put((time.monotonic(), data))
                    if sending.done():
                        return
            await waiting.put((time.monotonic(), b""))
            await asyncio.wait([sending])
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, waiting: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                read_at, data = await waiting.get()
                if not data:
                    return
                await self._until_open()
                await asyncio.sleep(max(0.0, read_at + self._manner.delay_s - time.monotonic()))
                await self._write(target, data)

    async def _write(self, target: asyncio.StreamWriter, data: bytes) -> None:
        """At once, or drop by drop for as long as the link drips."""
        while self._manner.way is Way.DRIP and data:
            drop = max(1, int(self._manner.bytes_per_s * DRIP_S))
            target.write(data[:drop])
            await target.drain()
            data = data[drop:]
            await asyncio.sleep(DRIP_S)
        if data:
            target.write(data)
            await target.drain()

    async def _until_open(self) -> None:
        while self._manner.way is Way.HALF_OPEN:
            await self._changed.wait()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with a reset, not with an end that looks orderly."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
