"""Parents and children: how a child's creation names its parent, and what tells a creation from any other. Pure.

A child's nonce is made of its parent's own creation, its run and the step. So every repeat of the creation, by whichever
owner of the parent, is the same one (protocol rule 14); another run's child, or that of a parent that was deleted and
created anew under the same id, is another.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple
from urllib.parse import quote, unquote

from toque._names import INSTANCE_ID_LENGTH_MAX, check_instance_id, check_step_name, check_workflow
from toque.storage.records import Admitted, StepKind

ID_HASH_BYTES = 10  # of a child's id that its parent did not choose


class Parent(NamedTuple):
    """The step of a parent's run that a child belongs to. Text form: "workflow id run kind occurrence name"."""

    workflow: str
    id: str
    run: int
    kind: StepKind
    occurrence: int
    name: str

    @property
    def waits(self) -> bool:
        """Whether the parent waits for the child's end."""
        return self.kind is StepKind.CHILD

    def text(self) -> str:
        """As it stands in the creation's header and in the child's Admitted record."""
        return " ".join((self.workflow, self.id, str(self.run), self.kind.name.lower(), str(self.occurrence),
                         quote(self.name, safe="")))

    @classmethod
    def parse(cls, text: str) -> Parent:
        """Raises ValueError, InvalidName for any other text."""
        workflow, id_, run, kind, occurrence, name = text.split(" ")
        if kind not in ("start", "child"):
            raise ValueError(f"no kind of step that has a child: {kind!r}")
        return cls(check_workflow(workflow), check_instance_id(id_), int(run), StepKind[kind.upper()], int(occurrence),
                   check_step_name(unquote(name)))


def child_nonce(account: str, parent: Admitted, run: int, key: str) -> str:
    """The nonce of the creation that the step `key` of this run of the parent makes."""
    return _hash(16, account, parent, run, key)


def child_id(account: str, parent: Admitted, run: int, key: str) -> str:
    """The id of a child that was given none: legal, the same in every replay, and told from all others' by a hash."""
    tail = _hash(ID_HASH_BYTES, account, parent, run, key)
    return f"{parent.id[:INSTANCE_ID_LENGTH_MAX - 1 - len(tail)]}-{tail}"


def _hash(size: int, account: str, parent: Admitted, run: int, key: str) -> str:
    parts = (account, parent.workflow, parent.id, parent.nonce, str(parent.created_at), str(run), key)
    return blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=size).hexdigest()
