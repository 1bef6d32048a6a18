"""Which instances a command acts on: ids as they were typed, ids on standard input, or all of a list that filters leave.

All of it is read and checked before anything is done.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from toque._names import check_instance_id
from toque.cli.instances import LATEST, find_instance
from toque.client import ENDED, Client, Instance, InstanceStatus
from toque.errors import UsageError

STDIN: Final = "-"
LIVE: Final = frozenset({"running", "waiting", "waitingForPause", "paused"})
CHOSEN_MAX: Final = 100_000  # instances that one command acts on
SHOWN_MAX: Final = 60  # characters of what cannot be read


class Named(NamedTuple):
    """An instance as somebody named it. Without a workflow all of the account are asked for the id."""

    id: str
    workflow: str | None

    def __str__(self) -> str:
        return f"{self.workflow}/{self.id}" if self.workflow else self.id


# -- as it was typed ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Selection:
    """What a command was told. `named` is None when no ids were given; `applies` = the statuses that it is good for.

    Raises UsageError where it is made when that says nothing, or two things.
    """

    named: Sequence[Named] | None
    every: bool
    workflow: str | None
    status: str | None
    applies: AbstractSet[str]

    def __post_init__(self) -> None:
        if self.named is not None and (self.every or self.status):
            raise UsageError("name ids, or --all with filters, not both")
        if self.named is None and not self.every:
            hint = ("add --all to mean all of those" if self.workflow or self.status
                    else "name ids, - for standard input, or --all")
            raise UsageError(f"which instances? {hint}; `toque instances list` shows them")
        if self.status in (LIVE | ENDED) - self.applies:
            raise UsageError(f"nothing would become of instances that are {self.status}: this is for those that are "
                             f"{', '.join(sorted(self.applies))}")

    async def rows(self, client: Client) -> AsyncIterator[InstanceStatus]:
        """With --all: those that the filters leave and the operation is good for, the oldest first.

        Raises UsageError, OwnerAway.
        """
        async for row in client.list(self.workflow, status=self.status):
            if row.status in self.applies:
                yield row


def selection(ids: Sequence[str] | None, every: bool, workflow: str | None, status: str | None,
              applies: AbstractSet[str]) -> Selection:
    """Of a command line. Reads standard input where an id is `-`. Raises UsageError."""
    return Selection(names(ids, workflow) if ids else None, every, workflow, status, applies)


def names(words: Sequence[str], workflow: str | None) -> list[Named]:
    """The instances of an argument list, each once. Raises UsageError for what is no id, InvalidName."""
    found = [named for word in words
             for named in (read_names(sys.stdin.read(), workflow) if word == STDIN else [Named(word, workflow)])]
    for named in found:
        if named.id != LATEST:
            check_instance_id(named.id)
    return list(dict.fromkeys(found))


def read_names(text: str, workflow: str | None) -> list[Named]:
    """One id a line, or what `-o json` and `-o ndjson` of `toque instances` and `toque trigger` print.

    Raises UsageError.
    """
    if text.lstrip()[:1] in ("{", "["):
        return [named for document in _documents(text) for named in _of_document(document, workflow)]
    return [Named(line.strip(), workflow) for line in text.splitlines() if line.strip()]


def _documents(text: str) -> list[Any]:
    try:
        return [msgspec.json.decode(text)]
    except msgspec.MsgspecError:
        pass  # then it is a document a line, or its error is told below
    try:
        return [msgspec.json.decode(line) for line in text.splitlines() if line.strip()]
    except msgspec.MsgspecError as error:
        raise UsageError(f"standard input begins like JSON and is none, nor a document a line: {error}") from error


def _of_document(document: Any, workflow: str | None) -> Iterator[Named]:
    match document:
        case list():
            for item in document:
                yield from _of_document(item, workflow)
        case str():
            yield Named(document, workflow)
        case {"id": str() as instance_id}:
            yield Named(instance_id, _agreed(document.get("workflow"), workflow, instance_id))
        case {"ids": list() as ids}:
            for instance_id in ids:
                yield Named(str(instance_id), _agreed(document.get("workflow"), workflow, str(instance_id)))
        case _:
            raise UsageError(f"standard input has {str(document)[:SHOWN_MAX]!r}, which names no instance: it takes ids, or "
                             "what `toque instances list -o json` prints")


def _agreed(told: Any, asked: str | None, instance_id: str) -> str | None:
    if told is None or asked in (None, told):
        return told or asked
    raise UsageError(f"standard input says that {instance_id!r} is of the workflow {told!r}, and --workflow says {asked!r}")


# -- who that is -------------------------------------------------------------------------------------------------------

async def chosen(client: Client, choice: Selection) -> tuple[list[Named], bool]:
    """The instances to act on, and whether there are more than CHOSEN_MAX.

    Raises UsageError, InstanceNotFound (there is no latest one), OwnerAway.
    """
    if choice.named is not None:
        return [await _resolved(client, named) for named in choice.named], False
    found: list[Named] = []
    async for row in choice.rows(client):
        if len(found) == CHOSEN_MAX:
            return found, True
        found.append(Named(row.id, row.workflow))
    return found, False


async def _resolved(client: Client, named: Named) -> Named:
    if named.id != LATEST:
        return named
    latest = await find_instance(client, LATEST, named.workflow)
    return Named(latest.id, latest.workflow)


class Workflows:
    """Makes handles of named instances. The account's workflows are read at most once, and only if they are needed."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._names: list[str] | None = None

    async def read(self, chosen: Sequence[Named]) -> None:
        """Call it first. Raises SetupError, BrokerUnavailable."""
        if not all(named.workflow for named in chosen):
            self._names = [report.workflow for report in await self._client.workflows()]

    async def handle(self, named: Named) -> Instance[Any]:
        """Raises InstanceNotFound, UsageError (two workflows have one of this id), OwnerAway."""
        if named.workflow is not None:
            return self._client.handle(named.workflow, named.id)
        return await find_instance(self._client, named.id, None, self._names)
