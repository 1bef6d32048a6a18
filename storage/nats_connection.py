"""One connection to NATS: nats-py's client, plus an inbox of our own and the rule that nothing is buffered.

nats-py keeps what is published while it has no connection and sends it after the reconnect, long after the caller was
told of a time-out. Here a message is refused at once without a connection, what nats-py still held when the connection
broke is thrown away, and every open question ends with BusTimeout. nats-py also gives up for good after some errors of
the server (an oversized message, an expired login); then a new client takes the place of the old one.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription

from toque._logging import get_logger
from toque.errors import BrokerUnavailable, PayloadTooLarge, SetupError
from toque.storage.nats_options import NatsOptions
from toque.storage.ports import BusTimeout, Headers

RECONNECT_WAIT_S = 0.2
PING_INTERVAL_S = 5
PINGS_OUTSTANDING_MAX = 2
REOPEN_WAIT_S = 1.0
FLUSH_S_MAX = 10
CLOSE_S_MAX = 5.0
OUTBOUND_BYTES_MAX = 16 * 1024 * 1024  # above it callers wait; nats-py itself must never make us wait inside a publish
SUBSCRIPTION_MESSAGES_MAX = 64 * 1024  # not handled yet; what comes on top is dropped and logged
SUBSCRIPTION_BYTES_MAX = 128 * 1024 * 1024
EXPIRY_S = 0.05
_NO_LIMIT = 2**62
_NOTHING_ASKED = None, "", 0.0
_ROOM_POLL_S = 0.005
_HEADERS_BYTES_ASSUMED = 4096  # messages that are smaller than the limit by this much are not measured exactly
# A peer that is gone without a word: the kernel gives up too, else closing the socket waits for its buffer to drain.
_TCP_USER_TIMEOUT_MS = (PINGS_OUTSTANDING_MAX + 1) * PING_INTERVAL_S * 1000

MessageCallback = Callable[[Msg], Awaitable[None]]
_log = get_logger("toque.nats")


class Handle:
    """A subscription that outlives reconnects; `close` ends it."""

    def __init__(self, connection: Connection, subject: str, callback: MessageCallback, unlimited: bool) -> None:
        self._connection = connection
        self._subject = subject
        self._callback = callback
        self._unlimited = unlimited
        self._subscription: NatsSubscription | None = None

    async def bind(self, client: Client) -> None:
        """Subscribe on a client. Unlimited ones are bounded by what their owner asks for; others drop the excess."""
        messages, size = (-1, 0) if self._unlimited else (SUBSCRIPTION_MESSAGES_MAX, SUBSCRIPTION_BYTES_MAX)
        self._subscription = await client.subscribe(self._subject, cb=self._callback, pending_msgs_limit=messages,
                                                    pending_bytes_limit=size)

    async def close(self) -> None:
        """Nothing is delivered any more once it returns."""
        self._connection.forget(self)
        if self._subscription is not None:
            with suppress(nats.errors.Error):  # the connection is closed, and the subscription with it
                await self._subscription.unsubscribe()


class _Client(Client):
    """nats-py's client, but what others send cannot end its reader: the server passes on any bytes.

    Its own raises on a subject that is not UTF-8 and on headers without the usual beginning; its reader dies of that, for
    good, and one such message in a stream would end every connection that comes to read it.
    """

    def _build_message(self, sid: int, subject: bytes, reply: bytes, data: bytes,
                       headers: dict[str, str] | None) -> Msg:
        return Msg(_client=self, subject=subject.decode(errors="replace"), reply=reply.decode(errors="replace"),
                   data=data, headers=headers, _sid=sid)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (ValueError, IndexError):
            return None


class Connection:
    """Made by `open`. All of it belongs to the loop that it was opened in."""

    def __init__(self, options: NatsOptions) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._client: Client = _Client()
        self._inbox = ""
        self._asked: dict[str, tuple[asyncio.Future[Msg], str, float]] = {}  # by token: future, subject, time-out
        self._expiries: dict[int, list[str]] = {}  # tokens by when their time-out ends, in steps of EXPIRY_S
        self._asked_ever = 0
        self._handles: set[Handle] = set()
        self._watchers: set[Callable[[bool], None]] = set()
        self._closing = False
        self._reopening: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, options: NatsOptions) -> Connection:
        """Connect. Raises BrokerUnavailable when nobody answers, SetupError when the login or TLS is refused."""
        connection = cls(options)
        client = await connection._dial()
        connection._client = client
        connection._inbox = f"{client.new_inbox()}."
        try:
            await connection.subscribe(f"{connection._inbox}*", connection._on_answer, unlimited=True)
            await connection.flush()
        except BaseException:
            await connection.close()
            raise
        return connection

    @property
    def options(self) -> NatsOptions:
        return self._options

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    @property
    def closed(self) -> bool:
        """`close` was called: there will be no connection any more."""
        return self._closing

    @property
    def max_payload(self) -> int:
        return self._client.max_payload

    @property
    def server_version(self) -> str:
        server = self._client.connected_server_version
        return f"{server.major}.{server.minor}.{server.patch}"

    def watch(self, watcher: Callable[[bool], None]) -> None:
        """Call `watcher(False)` when the connection is lost and `watcher(True)` when there is one again."""
        self._watchers.add(watcher)

    def unwatch(self, watcher: Callable[[bool], None]) -> None:
        self._watchers.discard(watcher)

    # -- sending -------------------------------------------------------------------------------------------------------

    def send(self, subject: str, data: bytes, headers: Headers | None = None, reply: str = "") -> None:
        """Hand a message to the socket. Raises BusTimeout without a connection (nothing was sent), PayloadTooLarge."""
        client = self._client
        if not client.is_connected:
            raise self._not_connected()
        self.require_fits(data, headers)
        # With its buffer unlimited nats-py's publish never suspends, so it can be run to its end without a task.
        publish = client.publish(subject, data, reply, headers or None)  # type: ignore[arg-type]  # it only reads them
        try:
            publish.send(None)
        except StopIteration:
            return
        publish.close()
        raise AssertionError("nats-py suspended in a publish")

    def require_fits(self, data: bytes, headers: Headers | None) -> None:
        """Raises PayloadTooLarge. The server counts headers too, and disconnects whoever sends more than it takes."""
        limit = self._client.max_payload
        if len(data) + _HEADERS_BYTES_ASSUMED <= limit:
            return
        size = wire_size(data, headers)
        if size > limit:
            raise PayloadTooLarge(
                f"a message of {size} bytes, headers included; the server takes {limit} (max_payload)",
                size=size, limit=limit)

    @property
    def clogged(self) -> bool:
        """More is waiting for the socket than should be."""
        return self._client.pending_data_size > OUTBOUND_BYTES_MAX

    async def room(self, timeout_s: float) -> None:
        """Wait until the socket has taken enough of what waits for it. Raises BusTimeout; nothing was sent."""
        end = self._loop.time() + timeout_s
        while self.clogged:
            if not self.connected:
                raise self._not_connected()
            if self._loop.time() >= end:
                raise BusTimeout(f"NATS at {self._options.shown} takes no more data; nothing was sent")
            await asyncio.sleep(_ROOM_POLL_S)

    def ask(self, subject: str, data: bytes, headers: Headers | None, timeout_s: float) -> asyncio.Future[Msg]:
        """Send with a reply subject of our own. The future gets the answer, or BusTimeout (up to EXPIRY_S late)."""
        self._asked_ever += 1
        token = str(self._asked_ever)
        self.send(subject, data, headers, self._inbox + token)
        future: asyncio.Future[Msg] = self._loop.create_future()
        self._asked[token] = future, subject, timeout_s
        # A timer for each question would cost a fifth of a publish: those that end at about the same time share one.
        expiry = int((self._loop.time() + timeout_s) / EXPIRY_S) + 1
        tokens = self._expiries.get(expiry)
        if tokens is None:
            tokens = self._expiries[expiry] = []
            self._loop.call_at(expiry * EXPIRY_S, self._expire, expiry)
        tokens.append(token)
        return future

    async def _on_answer(self, message: Msg) -> None:
        asked = self._asked.pop(message.subject[len(self._inbox):], None)
        if asked is not None and not asked[0].done():  # else it comes after the time-out, or nobody waits any more
            asked[0].set_result(message)

    def _expire(self, expiry: int) -> None:
        for token in self._expiries.pop(expiry):
            future, subject, timeout_s = self._asked.pop(token, _NOTHING_ASKED)
            if future is not None and not future.done():
                future.set_exception(
                    BusTimeout(f"no answer on {subject} within {timeout_s:g} s; the outcome is unknown"))

    def _fail_open(self, why: str) -> None:
        asked, self._asked = self._asked, {}
        for future, _, _ in asked.values():
            if not future.done():
                future.set_exception(BusTimeout(f"{why}; the outcome is unknown"))

    def _not_connected(self) -> BusTimeout:
        self._reopen_if_closed()
        return BusTimeout(f"no connection to NATS at {self._options.shown}; nothing was sent")

    # -- subscriptions -------------------------------------------------------------------------------------------------

    async def subscribe(self, subject: str, callback: MessageCallback, *, unlimited: bool = False) -> Handle:
        """Subscribe, now and after every reconnect. What is sent behind it on this connection already meets it."""
        if not self.connected:
            raise self._not_connected()
        handle = Handle(self, subject, callback, unlimited)
        self._handles.add(handle)
        try:
            await handle.bind(self._client)
        except BaseException:
            self.forget(handle)
            raise
        return handle

    def forget(self, handle: Handle) -> None:
        self._handles.discard(handle)

    def new_inbox(self) -> str:
        return self._client.new_inbox()

    async def flush(self) -> None:
        """Wait until the server has handled everything sent so far. Raises BusTimeout."""
        try:  # shielded: nats-py's reader dies of a pong whose waiter was cancelled
            await asyncio.shield(self._client.flush(FLUSH_S_MAX))
        except nats.errors.Error as error:
            raise BusTimeout(f"NATS at {self._options.shown} does not answer: {error}") from error

    # -- the connection's life -----------------------------------------------------------------------------------------

    async def _dial(self) -> Client:
        """A connected client. Its first connection fails fast; from then on it reconnects for ever."""
        client = _Client()
        link = _Link(self, client)
        try:
            await client.connect(
                list(self._options.servers), name=self._options.name,
                error_cb=link.on_error, disconnected_cb=link.on_disconnected, reconnected_cb=link.on_reconnected,
                closed_cb=link.on_closed, allow_reconnect=False, max_reconnect_attempts=1,
                reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # it only sleeps so long
                connect_timeout=self._options.connect_s,  # type: ignore[arg-type]  # it only waits so long
                ping_interval=PING_INTERVAL_S, max_outstanding_pings=PINGS_OUTSTANDING_MAX, pending_size=_NO_LIMIT,
                inbox_prefix=self._options.inbox_prefix, tls=self._options.tls_context(),
                tls_handshake_first=self._options.tls_first, **_login(self._options))
        except (OSError, TimeoutError, nats.errors.Error) as error:
            raise connect_error(self._options, link.last_error or error) from error
        client.options.update(allow_reconnect=True, max_reconnect_attempts=-1)
        _set_user_timeout(client)
        return client

    def lost(self, client: Client) -> None:
        """nats-py noticed that the connection is gone; it has not begun to connect again."""
        # What it could not hand to the socket would be sent after the reconnect, behind its caller's back.
        client._pending.clear()
        client._pending_data_size = 0
        if client is not self._client or self._closing:
            return
        _log.warning("connection lost", server=self._options.shown)
        self._fail_open("the connection to NATS was lost")
        self._tell(False)

    def regained(self, client: Client) -> None:
        """nats-py is connected again and has renewed the subscriptions."""
        _set_user_timeout(client)
        _log.info("connected again", server=self._options.shown)
        self._tell(True)

    def given_up(self, client: Client) -> None:
        """nats-py has given up on this client."""
        if client is self._client and not self._closing:
            self._reopen_if_closed()

    def _tell(self, connected: bool) -> None:
        for watcher in tuple(self._watchers):
            watcher(connected)

    def _reopen_if_closed(self) -> None:
        if self._client.is_closed and not self._closing and self._reopening is None:
            _log.error("the server closed the connection for good: opening another", server=self._options.shown,
                       reason=str(self._client.last_error))
            self._fail_open("the connection to NATS was closed")
            self._reopening = self._loop.create_task(self._reopen())

    async def _reopen(self) -> None:
        try:
            while True:
                if await self._reopened():
                    break
                await asyncio.sleep(REOPEN_WAIT_S)
        finally:
            self._reopening = None
        self.regained(self._client)

    async def _reopened(self) -> bool:
        try:
            client = await self._dial()
        except (BrokerUnavailable, SetupError) as error:
            _log.warning("no new connection yet", reason=str(error))
            return False
        self._client = client
        for handle in tuple(self._handles):
            await handle.bind(client)
        return True

    async def close(self) -> None:
        """Send what was handed over, end every open question with BusTimeout, and disconnect."""
        self._closing = True
        if self._reopening is not None:
            self._reopening.cancel()
        self._fail_open("the bus was closed")
        # In a task of its own: nats-py, while it begins to connect again, ends its close with a CancelledError that
        # nobody asked for, and here that would pass for a cancellation of the caller.
        closing = asyncio.ensure_future(self._client.close())
        try:
            await asyncio.wait([closing], timeout=CLOSE_S_MAX)
        finally:
            closing.cancel()
        if closing.done() and not closing.cancelled():
            with suppress(TimeoutError, OSError, nats.errors.Error):  # it is going away either way
                closing.result()


class _Link:
    """What one nats-py client reports to its connection (nats-py wants coroutine functions)."""

    def __init__(self, connection: Connection, client: Client) -> None:
        self._connection = connection
        self._client = client
        self.last_error: Exception | None = None

    async def on_error(self, error: Exception) -> None:
        self.last_error = error
        what = {"error": type(error).__name__, "reason": str(error)}
        if not isinstance(error, nats.errors.Error | OSError | TimeoutError):
            _log.error("a message handler raised", exc_info=error, **what)
        elif self._client.is_connected:
            _log.error("NATS error", **what)
        else:
            _log.debug("NATS error", **what)  # one for each attempt to connect again

    async def on_disconnected(self) -> None:
        self._connection.lost(self._client)

    async def on_reconnected(self) -> None:
        self._connection.regained(self._client)

    async def on_closed(self) -> None:
        self._connection.given_up(self._client)


def _login(options: NatsOptions) -> dict[str, Any]:
    """nats-py's arguments for the login; only what is set."""
    if options.credentials or options.nkey:
        _require_nkeys()
    login = {
        "user": options.user,
        "password": options.password,
        "token": options.token,
        "user_credentials": str(options.credentials) if options.credentials else None,
        "nkeys_seed": str(options.nkey) if options.nkey else None,
    }
    return {name: value for name, value in login.items() if value is not None}


def _require_nkeys() -> None:
    try:
        importlib.import_module("nkeys")  # as nats-py does when it signs
    except ImportError as error:
        raise SetupError("credentials and nkey files need one more package: pip install 'toque[nkeys]'") from error


def connect_error(options: NatsOptions, error: Exception) -> BrokerUnavailable | SetupError:
    """What to tell when the first connection fails."""
    where = f"NATS at {options.shown} (from {options.source})"
    if "authorization" in str(error).lower() or "authentication" in str(error).lower():
        return SetupError(f"{where} refused the login: check credentials, nkey, user or token")
    if isinstance(error, ssl.SSLError):
        return SetupError(f"no TLS with {where}: {error}")
    return BrokerUnavailable(
        f"cannot connect to {where}: {error}; start a server (`toque dev APP` does), or name another address "
        "with --nats, NATS_URL or a NATS context")


def wire_size(data: bytes, headers: Headers | None) -> int:
    """What the server counts of a message."""
    if not headers:
        return len(data)
    lines = sum(len(f"{name}: {text}\r\n".encode()) for name, text in headers.items())
    return len(data) + len("NATS/1.0\r\n\r\n") + lines


def _set_user_timeout(client: Client) -> None:
    """nats-py shows its socket nowhere in public; without it only the reconnect after a silent partition is slower."""
    writer = getattr(client._transport, "_io_writer", None)
    sock = writer.get_extra_info("socket") if writer is not None else None
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _TCP_USER_TIMEOUT_MS)
