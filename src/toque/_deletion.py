"""Deleting many instances: each id once, with a result for each position that is true for itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import msgspec

from toque._bounded import for_each
from toque.errors import ToqueError, UsageError

DELETIONS_IN_FLIGHT: Final = 256


class DeleteResult(msgspec.Struct, frozen=True):
    """What became of one id of a batch: `error` is None when the instance is gone now, by this call."""

    index: int
    id: str
    error: ToqueError | None = None

    @property
    def code(self) -> int | None:
        """Cloudflare's code of the error: 10400 there is no such instance. None without one."""
        return getattr(self.error, "code", None)


def checked_ids(ids: Iterable[str]) -> list[str]:
    """Raises UsageError for anything but ids; for a single text too, whose letters are none."""
    if isinstance(ids, str | bytes):
        raise UsageError(f"delete_batch takes a list of ids, not the text {ids!r:.80}; nothing was deleted")
    found = list(ids)
    for index, instance_id in enumerate(found):
        if not isinstance(instance_id, str):
            raise UsageError(f"id {index} of the batch is a {type(instance_id).__name__}, not a text; nothing was deleted")
    return found


async def delete_each(ids: Sequence[str], delete: Callable[[str], Awaitable[None]]) -> list[DeleteResult]:
    """`delete` raises ToqueError where it cannot; any other exception ends the call."""
    errors: dict[str, ToqueError] = {}

    async def one(instance_id: str) -> None:
        try:
            await delete(instance_id)
        except ToqueError as error:
            errors[instance_id] = error

    await for_each(one, iter(dict.fromkeys(ids)), DELETIONS_IN_FLIGHT)
    return [DeleteResult(index, instance_id, errors.get(instance_id)) for index, instance_id in enumerate(ids)]
