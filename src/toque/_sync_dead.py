"""`SyncClient.dead`: the parked messages of the account, for blocking code."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from toque._dead import TIMEOUT_DEFAULT, DeadContent, DeadCount, DeadMessage, DeadResult
from toque._durations import Duration
from toque.workflow import Workflow

if TYPE_CHECKING:
    from toque.sync_client import SyncClient


class SyncDeadMessages:
    """`client.dead`: the methods of `DeadMessages`, with the same errors and the same promises after a crash."""

    def __init__(self, client: SyncClient) -> None:
        self._client = client

    def list(self, *, kind: str | None = None, workflow: type[Workflow[Any, Any]] | str | None = None,
             reason_contains: str | None = None, limit: int | None = None, after: int | None = None,
             timeout: Duration = TIMEOUT_DEFAULT) -> Iterator[DeadMessage]:
        """Parked messages, the oldest first, read in pages while you iterate: see `DeadMessages.list`."""
        return self._client._rows(lambda client: client.dead.list(
            kind=kind, workflow=workflow, reason_contains=reason_contains, limit=limit, after=after, timeout=timeout))

    def get(self, sequence: int, *, timeout: Duration = TIMEOUT_DEFAULT) -> DeadContent:
        """One parked message with its body. Raises NotParked."""
        return self._client._call(lambda client: client.dead.get(sequence, timeout=timeout))

    def count(self, *, kind: str | None = None, workflow: type[Workflow[Any, Any]] | str | None = None,
              timeout: Duration = TIMEOUT_DEFAULT) -> builtins.list[DeadCount]:
        """How many messages are parked for what, the most first: see `DeadMessages.count`."""
        return self._client._call(lambda client: client.dead.count(kind=kind, workflow=workflow, timeout=timeout))

    def retry(self, sequence: int, *, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Send a parked message again as it came: see `DeadMessages.retry`."""
        return self._client._call(lambda client: client.dead.retry(sequence, timeout=timeout))

    def drop(self, sequence: int) -> bool:
        """Delete a parked message for good. False when it was gone already."""
        return self._client._call(lambda client: client.dead.drop(sequence))

    def retry_many(self, sequences: Iterable[int], *,
                   timeout: Duration = TIMEOUT_DEFAULT) -> builtins.list[DeadResult]:
        """`retry` each of them: one result per sequence, in order."""
        return self._client._call(lambda client: client.dead.retry_many(sequences, timeout=timeout))

    def drop_many(self, sequences: Iterable[int]) -> builtins.list[DeadResult]:
        """`drop` each of them: one result per sequence, in order."""
        return self._client._call(lambda client: client.dead.drop_many(sequences))
