"""The blocking client, for Django, Flask, Celery and scripts: the asyncio client on a thread of its own.

One daemon thread with its own loop and connection per SyncClient and process, begun by the first call. After a fork
the child begins a thread and a connection of its own; what it inherited is left alone for ever, neither used nor
closed, because the parent still speaks through the same sockets.
"""

from __future__ import annotations

import asyncio
import builtins
import concurrent.futures
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Generic, TypeVar, Unpack, overload

from toque._creation import BatchResult, NewInstance
from toque._deletion import DeleteResult, checked_ids
from toque._durations import Duration
from toque._lists import PAGE_ROWS_DEFAULT, ListFilters
from toque._names import check_account, check_instance_id
from toque._protocol import AccountRecord, DescribeView, PodView
from toque._reports import QueueReport, StationReport, WorkflowReport
from toque._sync_dead import SyncDeadMessages
from toque._watch import WatchEvent
from toque.client import (
    BATCH_TIMEOUT_DEFAULT,
    TIMEOUT_DEFAULT,
    Client,
    Instance,
    InstanceStatus,
    Page,
    StepRef,
    TlsFiles,
    workflow_types,
)
from toque.errors import MisuseError, Unavailable
from toque.workflow import Retention, Workflow

__all__ = ["SyncAccounts", "SyncClient", "SyncInstance"]

CLOSE_S_MAX: Final = 5.0
CLOSED: Final = "the SyncClient is closed: make another one"
ROWS_FETCHED: Final = 100  # of a list, per hop to the loop's thread

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")


class _Running:
    """A loop that runs in a daemon thread, and the client that lives on it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.client: Client | None = None
        self._thread = threading.Thread(target=self._run, name="toque-sync-client", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it on the loop and wait. An interrupt (Ctrl-C, say) cancels it there and goes on here."""
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except RuntimeError as error:  # the loop is closed
            coroutine.close()
            raise MisuseError(CLOSED) from error
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise MisuseError(CLOSED) from None
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Close the client, end what is under way, and end the thread."""
        future = asyncio.run_coroutine_threadsafe(self._wind_up(), self.loop)
        try:
            future.result(CLOSE_S_MAX)
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(CLOSE_S_MAX)

    async def _wind_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if self.client is not None:
            await self.client.close()
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


_inherited: list[_Running] = []  # of the parent process: kept, so that no finaliser closes the parent's sockets
_clients: weakref.WeakSet[SyncClient] = weakref.WeakSet()


def _leave_parents_alone() -> None:
    for client in list(_clients):
        client._after_fork()


os.register_at_fork(after_in_child=_leave_parents_alone)


class SyncClient:
    """The blocking client of one account. Safe to share between threads, and to make before a fork.

    Making one connects nothing: the first call does, in each process. Its methods are those of `Client`, with the same
    errors and the same promises after a crash; errors carry a SyncInstance as their handle. In a thread whose asyncio
    loop is running every call raises MisuseError: use `Client` there. Ctrl-C ends the call under way (a creation is
    then stored or not) and leaves the client usable.
    """

    def __init__(self, url: str | None = None, *, account: str = "main", credentials: Path | str | None = None,
                 tls: TlsFiles | None = None, context: str | None = None, name: str = "toque-sync-client",
                 connect: Callable[[], Coroutine[Any, Any, Client]] | None = None) -> None:
        check_account(account)

        async def connecting() -> Client:
            return await Client.connect(url, account=account, credentials=credentials, tls=tls, context=context,
                                        name=name)

        self._account = account
        self._connect = connect or connecting
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._closed = False
        self.accounts = SyncAccounts(self)
        self.dead = SyncDeadMessages(self)
        _clients.add(self)

    @classmethod
    def connect(cls, url: str | None = None, *, account: str = "main", credentials: Path | str | None = None,
                tls: TlsFiles | None = None, context: str | None = None, name: str = "toque-sync-client") -> SyncClient:
        """Make a client and connect at once. Raises as `Client.connect`."""
        client = cls(url, account=account, credentials=credentials, tls=tls, context=context, name=name)
        client._here()
        return client

    @property
    def account(self) -> str:
        """The account that it works in."""
        return self._account

    def close(self) -> None:
        """Close the connection and end the thread. Idempotent; later calls raise MisuseError."""
        _refuse_in_loop()
        with self._lock:
            running, self._running, self._closed = self._running, None, True
        if running is not None and running.pid == os.getpid():
            running.stop()

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _after_fork(self) -> None:
        """In the child: the lock may be held by a thread that is not here."""
        self._lock = threading.Lock()
        if self._running is not None:
            _inherited.append(self._running)
            self._running = None

    def _here(self) -> _Running:
        """This process's loop, begun and connected if need be."""
        _refuse_in_loop()
        with self._lock:
            if self._closed:
                raise MisuseError(CLOSED)
            if self._running is not None and self._running.pid == os.getpid():
                return self._running
            running = _Running()
            try:
                running.client = running.call(self._connect())
            except BaseException:
                running.stop()
                raise
            self._running = running
            return running

    def _call(self, call: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        running = self._here()
        assert running.client is not None, "a loop is kept only with its client"
        try:
            return running.call(call(running.client))
        except Unavailable as error:
            error.handle = self._own_handle(error.handle)
            raise

    def _own_handle(self, handle: Any) -> Any:
        if not isinstance(handle, Instance):
            return handle
        return SyncInstance(self, handle.workflow, handle.id, handle.result_type)

    # -- creating -------------------------------------------------------------------------------------------------

    @overload
    def create(self, workflow: type[Workflow[None, R]], params: None = None, *, id: str | None = None,
               retention: Retention | None = None, timeout: Duration = TIMEOUT_DEFAULT) -> SyncInstance[R]: ...

    @overload
    def create(self, workflow: type[Workflow[P, R]], params: P, *, id: str | None = None,
               retention: Retention | None = None, timeout: Duration = TIMEOUT_DEFAULT) -> SyncInstance[R]: ...

    @overload
    def create(self, workflow: str, params: Any = None, *, id: str | None = None,
               retention: Retention | None = None, timeout: Duration = TIMEOUT_DEFAULT) -> SyncInstance[Any]: ...

    def create(self, workflow: Any, params: Any = None, *, id: str | None = None,
               retention: Retention | None = None, timeout: Duration = TIMEOUT_DEFAULT) -> SyncInstance[Any]:
        """See `Client.create`: when it returns, the creation is stored for good."""
        handle = self._call(lambda client: client.create(workflow, params, id=id, retention=retention,
                                                           timeout=timeout))
        return SyncInstance(self, handle.workflow, handle.id, handle.result_type)

    def create_batch(self, workflow: type[Workflow[P, Any]] | str, items: Iterable[NewInstance], *,
                     timeout: Duration = BATCH_TIMEOUT_DEFAULT) -> builtins.list[BatchResult]:
        """See `Client.create_batch`: one result per item, in order, each true for itself."""
        taken = builtins.list(items)  # here, so that the caller's generator runs in the caller's thread
        results = self._call(lambda client: client.create_batch(workflow, taken, timeout=timeout))
        self._own_handles(results)
        return results

    def delete_batch(self, workflow: type[Workflow[Any, Any]] | str, ids: Iterable[str], *,
                     timeout: Duration = BATCH_TIMEOUT_DEFAULT) -> builtins.list[DeleteResult]:
        """See `Client.delete_batch`: one result per id, in order, each true for itself."""
        taken = checked_ids(ids)
        results = self._call(lambda client: client.delete_batch(workflow, taken, timeout=timeout))
        self._own_handles(results)
        return results

    def _own_handles(self, results: Iterable[BatchResult | DeleteResult]) -> None:
        for result in results:
            if isinstance(result.error, Unavailable):
                result.error.handle = self._own_handle(result.error.handle)

    # -- one instance ---------------------------------------------------------------------------------------------

    @overload
    def handle(self, workflow: type[Workflow[Any, R]], id: str) -> SyncInstance[R]: ...

    @overload
    def handle(self, workflow: str, id: str) -> SyncInstance[Any]: ...

    def handle(self, workflow: Any, id: str) -> SyncInstance[Any]:
        """A handle of an instance, without asking whether it exists; connects nothing. Raises InvalidName."""
        name, _, result_type = workflow_types(workflow)
        return SyncInstance(self, name, check_instance_id(id), result_type)

    @overload
    def get(self, workflow: type[Workflow[Any, R]], id: str, *,
            timeout: Duration = TIMEOUT_DEFAULT) -> SyncInstance[R]: ...

    @overload
    def get(self, workflow: str, id: str, *, timeout: Duration = TIMEOUT_DEFAULT) -> SyncInstance[Any]: ...

    def get(self, workflow: Any, id: str, *, timeout: Duration = TIMEOUT_DEFAULT) -> SyncInstance[Any]:
        """A handle of an instance that exists. Raises InstanceNotFound (its owner says so), OwnerAway."""
        handle = self.handle(workflow, id)
        handle.status(timeout=timeout)
        return handle

    def list(self, workflow: type[Workflow[Any, Any]] | str | None = None, *, limit: int | None = None,
             page_size: int = PAGE_ROWS_DEFAULT, timeout: Duration = TIMEOUT_DEFAULT,
             **filters: Unpack[ListFilters]) -> Iterator[InstanceStatus]:
        """See `Client.list`: admitted instances, oldest first, read in pages while you iterate."""
        return self._rows(lambda client: client.list(workflow, limit=limit, page_size=page_size, timeout=timeout,
                                                     **filters))

    def list_page(self, workflow: type[Workflow[Any, Any]] | str | None = None, *, cursor: str | None = None,
                  limit: int = PAGE_ROWS_DEFAULT, timeout: Duration = TIMEOUT_DEFAULT,
                  **filters: Unpack[ListFilters]) -> Page:
        """One page of such a list and the cursor of the next: see `Client.list_page`."""
        return self._call(lambda client: client.list_page(workflow, cursor=cursor, limit=limit, timeout=timeout,
                                                          **filters))

    def _rows(self, rows_of: Callable[[Client], AsyncGenerator[T, None]]) -> Iterator[T]:
        """What an asynchronous list of the client yields, fetched in pages while you iterate."""

        async def begin(client: Client) -> AsyncGenerator[T, None]:
            return rows_of(client)

        rows = self._call(begin)
        while True:
            page = self._call(lambda client: _next_rows(rows))
            yield from page
            if len(page) < ROWS_FETCHED:
                return

    def subscribe(self, instances: Iterable[SyncInstance[Any]], *,
                  cursors: Mapping[tuple[str, str], str] | None = None, filter: Collection[str] | None = None,
                  timeout: Duration | None = None) -> Iterator[WatchEvent]:
        """See `Client.subscribe`: the events of many instances in one."""
        taken = builtins.list(instances)
        return self._events(lambda client: client.subscribe(
            [instance._on(client) for instance in taken], cursors=cursors, filter=filter, timeout=timeout))

    def _events(self, events_of: Callable[[Client], AsyncGenerator[T, None]]) -> Iterator[T]:
        """What an asynchronous iterator of the client yields, each as soon as it is there."""

        async def begin(client: Client) -> AsyncGenerator[T, None]:
            return events_of(client)

        async def next_of(events: AsyncGenerator[T, None]) -> T | None:
            return await anext(events, None)

        events = self._call(begin)
        try:
            while (event := self._call(lambda client: next_of(events))) is not None:
                yield event
        finally:
            self._call(lambda client: _close(events))

    # -- the account ----------------------------------------------------------------------------------------------

    def pods(self, *, count_tasks: bool = False) -> builtins.list[PodView]:
        """The pods that answer now, by name: see `Client.pods`."""
        return self._call(lambda client: client.pods(count_tasks=count_tasks))

    def stations(self) -> builtins.list[StationReport]:
        """Every station with its owner's view, or why there is none."""
        return self._call(lambda client: client.stations())

    def counts(self, workflow: type[Workflow[Any, Any]] | str | None = None, *,
               timeout: Duration = TIMEOUT_DEFAULT) -> dict[str, dict[str, int]]:
        """How many instances there are, by workflow and status: see `Client.counts`."""
        return self._call(lambda client: client.counts(workflow, timeout=timeout))

    def queues(self, *, count_stations: bool = False) -> builtins.list[QueueReport]:
        """Every workflow's queue: see `Client.queues`."""
        return self._call(lambda client: client.queues(count_stations=count_stations))

    def workflows(self) -> builtins.list[WorkflowReport]:
        """Every workflow ever served here, and by which live pods now."""
        return self._call(lambda client: client.workflows())


async def _next_rows(rows: AsyncGenerator[T, None]) -> list[T]:
    """The next ROWS_FETCHED rows, or what is left."""
    page: list[T] = []
    async for row in rows:
        page.append(row)
        if len(page) == ROWS_FETCHED:
            break
    return page


async def _close(events: AsyncGenerator[Any, None]) -> None:
    await events.aclose()


class SyncInstance(Generic[R]):
    """A handle of one instance, like `Instance`; valid in every thread, and in children forked later."""

    __slots__ = ("_client", "id", "result_type", "workflow")

    def __init__(self, client: SyncClient, workflow: str, id: str, result_type: Any = Any) -> None:
        self._client = client
        self.result_type = result_type
        self.workflow = workflow
        self.id = id

    def __str__(self) -> str:
        return f"{self.workflow}/{self.id}"

    def __repr__(self) -> str:
        return f"SyncInstance({self.workflow!r}, {self.id!r})"

    def status(self, *, timeout: Duration = TIMEOUT_DEFAULT) -> InstanceStatus:
        """How it stands: see `Instance.status`."""
        return self._client._call(lambda client: self._on(client).status(timeout=timeout))

    def describe(self, *, timeout: Duration = TIMEOUT_DEFAULT) -> DescribeView:
        """The instance with its params and steps: see `Instance.describe`."""
        return self._client._call(lambda client: self._on(client).describe(timeout=timeout))

    def watch(self, cursor: str | None = None, *, filter: Collection[str] | None = None,
              timeout: Duration | None = None) -> Iterator[WatchEvent]:
        """Its events, kept ones first and then live: see `Instance.watch`."""
        return self._client._events(
            lambda client: self._on(client).watch(cursor, filter=filter, timeout=timeout))

    def terminate(self, *, children: bool = False, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """End it without a result: see `Instance.terminate`."""
        self._client._call(lambda client: self._on(client).terminate(children=children, timeout=timeout))

    def send_event(self, type: str, payload: Any = None, *, event_id: str | None = None,
                   timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Send an event that is recorded when this returns: see `Instance.send_event`."""
        self._client._call(
            lambda client: self._on(client).send_event(type, payload, event_id=event_id, timeout=timeout))

    def approve(self, name: str, *, by: str, comment: str = "", timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Approve what `step.wait_for_approval(name)` waits for: see `Instance.approve`."""
        self._client._call(lambda client: self._on(client).approve(name, by=by, comment=comment, timeout=timeout))

    def reject(self, name: str, *, by: str, comment: str = "", timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Reject what `step.wait_for_approval(name)` waits for: see `Instance.reject`."""
        self._client._call(lambda client: self._on(client).reject(name, by=by, comment=comment, timeout=timeout))

    def pause(self, *, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Let it stand still until `resume`: see `Instance.pause`."""
        self._client._call(lambda client: self._on(client).pause(timeout=timeout))

    def resume(self, *, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Go on after a pause: see `Instance.resume`."""
        self._client._call(lambda client: self._on(client).resume(timeout=timeout))

    def restart(self, *, from_: StepRef | None = None, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Begin another run of it: see `Instance.restart`."""
        self._client._call(lambda client: self._on(client).restart(from_=from_, timeout=timeout))

    def delete(self, *, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Forget it: see `Instance.delete`."""
        self._client._call(lambda client: self._on(client).delete(timeout=timeout))

    def result(self, timeout: Duration | None = None) -> R:
        """Wait for its end and return its output: see `Instance.result`."""
        return self._client._call(lambda client: self._on(client).result(timeout))

    def _on(self, client: Client) -> Instance[R]:
        return Instance(client, self.workflow, self.id, self.result_type)


class SyncAccounts:
    """`client.accounts`: make, list, show and change accounts."""

    def __init__(self, client: SyncClient) -> None:
        self._client = client

    def create(self, name: str, /, **settings: Any) -> AccountRecord:
        """Make an account; the same call again is harmless: see `Accounts.create`."""
        return self._client._call(lambda client: client.accounts.create(name, **settings))

    def list(self) -> builtins.list[AccountRecord]:
        """Every account on the server, by name."""
        return self._client._call(lambda client: client.accounts.list())

    def describe(self, name: str) -> AccountRecord:
        """The account's settings."""
        return self._client._call(lambda client: client.accounts.describe(name))

    def set(self, name: str, /, **settings: Any) -> AccountRecord:
        """Change settings: see `Accounts.set`."""
        return self._client._call(lambda client: client.accounts.set(name, **settings))


def _refuse_in_loop() -> None:
    """Blocking a running loop would stop everything on it, perhaps the very answer that is waited for."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise MisuseError("SyncClient was called in a thread whose asyncio loop is running, which it would block: "
                      "use `await Client.connect()` there")
