"""One stream of the in-memory broker: what it stores, refuses, expires and purges, as nats-server 2.15 measured.

No input and no output: the broker calls it with the time, and the conformance suite compares it with the real server.
"""

from __future__ import annotations

import heapq
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final

import msgspec

from toque._subjects import (
    BATCH_COMMIT_HEADER,
    BATCH_ID_HEADER,
    BATCH_SEQUENCE_HEADER,
    EXPECTED_LAST_HEADER,
    MARKER_HEADER,
    SIZE_HEADER,
    TTL_HEADER,
    station_number,
)
from toque.storage.ports import BATCH_MESSAGES_MAX, BusError, Headers, Message, StreamConfig

ROLLUP_HEADER: Final = "Nats-Rollup"
BATCHES_MAX: Final = 50  # staged at once in one stream
BATCH_IDLE_MS_MAX: Final = 10_000
BAD_REQUEST: Final = 10003
MESSAGE_TOO_LARGE: Final = 10054
INVALID_CONFIG: Final = 10052
TTL_INVALID: Final = 10165
TTL_DISABLED: Final = 10166
BATCH_DISABLED: Final = 10174
BATCH_SEQUENCE_MISSING: Final = 10175
BATCH_INCOMPLETE: Final = 10176
BATCH_ID_INVALID: Final = 10179
BATCH_TOO_LARGE: Final = 10199
BATCH_COMMIT_INVALID: Final = 10200
BATCHES_TOO_MANY: Final = 10210
_BATCH_ID_CHARS_MAX: Final = 64
_RECORD_BYTES: Final = 30  # of a stored message beside subject, headers and data; 4 more where it has headers
_COMPACT_SLACK: Final = 1024
_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


# -- subjects ----------------------------------------------------------------------------------------------------------

def is_literal(pattern: str) -> bool:
    return "*" not in pattern and ">" not in pattern


@lru_cache(maxsize=4096)
def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a subject matches the pattern, in which `*` is a token and `>` one or more at the end."""
    if is_literal(pattern):
        return pattern.__eq__
    expression = re.escape(pattern).replace(r"\*", r"[^.]+")
    if expression.endswith(">"):
        expression = expression[:-1] + ".+"
    compiled = re.compile(expression)
    return lambda subject: compiled.fullmatch(subject) is not None


def overlap(one: str, other: str) -> bool:
    """Whether there is a subject that matches both patterns."""
    left, right = one.split("."), other.split(".")
    for a, b in zip(left, right, strict=False):
        if ">" in (a, b):
            return True
        if a != b and "*" not in (a, b):
            return False
    return len(left) == len(right)


def transform(subject: str, rule: dict[str, str] | None) -> str:
    """The subject under which a message is stored: `partition(n,i…)` and `wildcard(i)` name tokens of the source."""
    if rule is None or not matcher(rule["src"])(subject) or not {"*", ">"}.isdisjoint(subject.split(".")):
        return subject  # what has a wildcard for a token is stored as it came
    pairs = zip(rule["src"].split("."), subject.split("."), strict=False)
    found = [token for place, token in pairs if place == "*"]
    return re.sub(r"\{\{(\w+)\(([\d,]+)\)\}\}", lambda call: _evaluate(call[1], call[2], found), rule["dest"])


def _evaluate(function: str, arguments: str, found: list[str]) -> str:
    numbers = [int(text) for text in arguments.split(",")]
    if function == "wildcard":
        return found[numbers[0] - 1]
    if function == "partition":
        return str(station_number("".join(found[place - 1] for place in numbers[1:]), numbers[0]))
    raise BusError(INVALID_CONFIG, f"the in-memory broker knows no subject transform function {function!r}")


# -- headers, sizes and times ------------------------------------------------------------------------------------------

def header_bytes(headers: Headers | None) -> int:
    """Bytes of the headers on the wire."""
    if not headers:
        return 0
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    return len("NATS/1.0\r\n\r\n") + len("".join(lines).encode())


def _stored_bytes(message: Message) -> int:
    in_headers = header_bytes(message.headers)
    return _RECORD_BYTES + len(message.subject) + len(message.data) + in_headers + (4 if in_headers else 0)


def without_body(message: Message) -> Message:
    """As a consumer for headers only delivers it."""
    headers = {**(message.headers or {}), SIZE_HEADER: str(len(message.data))}
    return Message(message.subject, b"", headers, sequence=message.sequence, time_ms=message.time_ms)


def parse_ttl_s(text: str) -> int:
    """Whole seconds, as the server takes them: 1500ms is 1 s. Raises BusError below one second."""
    if text.isdecimal() and text != "0":
        return int(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s)", text)
    seconds = math.floor(sum(float(number) * _UNITS_S[unit] for number, unit in parts))
    if "".join(number + unit for number, unit in parts) != text or seconds < 1:
        raise BusError(TTL_INVALID, "invalid per-message TTL")
    return seconds


def format_ttl(seconds: int) -> str:
    """As Go prints a duration: 5s, 1m0s, 1h0m0s."""
    hours, minutes = seconds // 3600, seconds // 60 % 60
    head = f"{hours}h" if hours else ""
    return f"{head}{minutes}m{seconds % 60}s" if hours or minutes else f"{seconds}s"


# -- the stream --------------------------------------------------------------------------------------------------------

class _Batch:
    """An atomic batch that is staged and not committed yet."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.last_ms = 0


class MemoryStream:
    """The messages of one stream, with its limits. Refusals are BusError with the server's code and description."""

    def __init__(self, config: StreamConfig, *, created: str) -> None:
        check_config(config)
        self.config = config
        self.created = created
        self.last_sequence = 0
        self.bytes = 0
        self._messages: dict[int, Message] = {}  # ascending
        self._log: list[int] = []  # ascending; may hold sequences that are gone
        self._subjects: dict[str, list[int]] = {}  # ascending in each
        self._deadlines: list[tuple[int, int]] = []  # heap of (ms, sequence); may hold sequences that are gone
        self._batches: dict[str, _Batch] = {}

    def __len__(self) -> int:
        return len(self._messages)

    # -- reading

    @property
    def first_sequence(self) -> int:
        return next(iter(self._messages), self.last_sequence + 1 if self.last_sequence else 0)

    def at(self, sequence: int) -> Message | None:
        if sequence < 1:
            raise BusError(BAD_REQUEST, "bad request")
        return self._messages.get(sequence)

    def last(self, pattern: str) -> Message | None:
        """The newest message whose stored subject matches."""
        sequences = self._subjects.get(pattern, []) if is_literal(pattern) else self.last_sequences([pattern])
        return self._messages[sequences[-1]] if sequences else None

    def last_sequences(self, patterns: Sequence[str]) -> list[int]:
        """Of each matching subject the newest message's sequence, ascending."""
        tests = [matcher(pattern) for pattern in patterns]
        return sorted(found[-1] for subject, found in self._subjects.items() if any(test(subject) for test in tests))

    def counts(self, pattern: str) -> dict[str, int]:
        """Messages per matching subject."""
        matches = matcher(pattern)
        return {subject: len(found) for subject, found in self._subjects.items() if matches(subject)}

    def after(self, sequence: int, patterns: Sequence[str]) -> Iterator[Message]:
        """The matching messages above a sequence, in order."""
        tests = [matcher(pattern) for pattern in patterns]
        for place in range(bisect_left(self._log, sequence + 1), len(self._log)):
            message = self._messages.get(self._log[place])
            if message is not None and any(test(message.subject) for test in tests):
                yield message

    # -- writing

    def takes(self, subject: str) -> bool:
        return any(matcher(pattern)(subject) for pattern in self.config.subjects)

    def publish(self, message: Message, now_ms: int) -> tuple[int, dict[str, object]] | None:
        """Store a published message: its sequence and what else the acknowledgement says.

        None: a batch's message was staged, the batch's commit will tell. Raises BusError; then nothing was stored.
        """
        if BATCH_ID_HEADER in (message.headers or ()):
            return self._publish_in_batch(message, now_ms)
        self._check_size(message)
        subject = self._check(message, {})
        self._check_room_of_one(subject, _stored_bytes(message))
        return self._store(subject, message.data, message.headers, now_ms), {}

    def _check_size(self, message: Message) -> None:
        size = header_bytes(message.headers) + len(message.data)
        if 0 <= self.config.max_msg_size < size:
            raise BusError(MESSAGE_TOO_LARGE, "message size exceeds maximum allowed")

    def _check(self, message: Message, staged: Mapping[str, int]) -> str:
        """The stored subject, once the headers have let the message through. `staged`: earlier ones of its batch."""
        subject = transform(message.subject, self.config.subject_transform)
        ttl, expected = message.header(TTL_HEADER), message.header(EXPECTED_LAST_HEADER)
        if ttl and not self.config.allow_msg_ttl:
            raise BusError(TTL_DISABLED, "per-message TTL is disabled")
        if expected:
            self._check_last(subject, int(expected), staged)
        if ttl:
            parse_ttl_s(ttl)
        return subject

    def _check_last(self, subject: str, expected: int, staged: Mapping[str, int]) -> None:
        if subject in staged:
            raise BusError(BusError.IN_FLIGHT, "wrong last sequence")
        found = self._subjects.get(subject, [0])[-1]
        if expected != found:
            raise BusError(BusError.WRONG_LAST_SEQUENCE, f"wrong last sequence: {found}")

    def _check_room_of_one(self, subject: str, size: int) -> None:
        """A message that takes the place of its subject's older one always has room."""
        of_subject = len(self._subjects.get(subject, ())) + 1
        self._check_room_of_subject(of_subject)
        replaces = 0 < self.config.max_msgs_per_subject < of_subject
        if not replaces:
            self._check_room_in_all(len(self._messages) + 1, self.bytes + size)

    def _check_room_of_subject(self, messages: int) -> None:
        if self.config.discard_new_per_subject and messages > self.config.max_msgs_per_subject:
            raise BusError(BusError.MAXIMUM_MESSAGES, "maximum messages per subject exceeded")

    def _check_room_in_all(self, messages: int, size: int) -> None:
        if self.config.discard != "new":
            return
        if 0 < self.config.max_msgs < messages:
            raise BusError(BusError.MAXIMUM_MESSAGES, "maximum messages exceeded")
        if 0 < self.config.max_bytes < size:
            raise BusError(BusError.MAXIMUM_MESSAGES, "maximum bytes exceeded")

    def _store(self, subject: str, data: bytes, headers: Headers | None, now_ms: int) -> int:
        self.last_sequence += 1
        headers = self._with_least_ttl(headers)
        message = Message(subject, data, headers, sequence=self.last_sequence, time_ms=now_ms)
        self._messages[self.last_sequence] = message
        self._log.append(self.last_sequence)
        self._subjects.setdefault(subject, []).append(self.last_sequence)
        self.bytes += _stored_bytes(message)
        self._set_deadline(message)
        self._enforce_limits(subject)
        return self.last_sequence

    def _with_least_ttl(self, headers: Headers | None) -> Headers | None:
        """A subject that keeps several messages has no TTL below its marker's: the server raises it."""
        least_s = self.config.subject_delete_marker_ttl // 1_000_000_000
        ttl = headers.get(TTL_HEADER, "") if headers else ""
        if not ttl or self.config.max_msgs_per_subject == 1 or parse_ttl_s(ttl) >= least_s:
            return headers
        return {**(headers or {}), TTL_HEADER: str(least_s)}

    def _enforce_limits(self, subject: str) -> None:
        config = self.config
        of_subject = self._subjects.get(subject, [])
        while 0 < config.max_msgs_per_subject < len(of_subject):
            self._remove(of_subject[0])
        if config.discard == "old":
            while 0 < config.max_msgs < len(self._messages) or 0 < config.max_bytes < self.bytes:
                self._remove(next(iter(self._messages)))

    def _remove(self, sequence: int) -> Message:
        message = self._messages.pop(sequence)
        of_subject = self._subjects[message.subject]
        of_subject.remove(sequence)
        if not of_subject:
            del self._subjects[message.subject]
        self.bytes -= _stored_bytes(message)
        if len(self._log) > 2 * len(self._messages) + _COMPACT_SLACK:
            self._log = list(self._messages)
        return message

    def purge(self, pattern: str, below_sequence: int) -> int:
        """Delete the matching messages below a sequence. Returns how many."""
        matches = matcher(pattern)
        gone = []
        for sequence, message in self._messages.items():
            if sequence >= below_sequence:
                break
            if matches(message.subject):
                gone.append(sequence)
        for sequence in gone:
            self._remove(sequence)
        return len(gone)

    def delete(self, sequence: int) -> bool:
        """Delete one message. False when there is none at the sequence."""
        if sequence in self._messages:
            self._remove(sequence)
            return True
        return False

    def update(self, config: StreamConfig) -> None:
        """Take other limits; messages beyond them leave if old ones are discarded."""
        check_config(config)
        self.config = config
        for subject in list(self._subjects):
            self._enforce_limits(subject)

    # -- expiry

    def _set_deadline(self, message: Message) -> None:
        ages_ms = []
        if self.config.max_age > 0:
            ages_ms.append(self.config.max_age // 1_000_000)
        ttl = message.header(TTL_HEADER)
        if ttl:
            ages_ms.append(parse_ttl_s(ttl) * 1000)
        if ages_ms:
            heapq.heappush(self._deadlines, (message.time_ms + min(ages_ms), message.sequence))

    def next_deadline_ms(self) -> int | None:
        """When the next message is to expire."""
        while self._deadlines and self._deadlines[0][1] not in self._messages:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self, now_ms: int) -> int:
        """Remove what is over its time, and leave a marker for each subject of which nothing is left then.

        Returns how many messages went.
        """
        due = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            due.append(heapq.heappop(self._deadlines)[1])
        gone = [sequence for sequence in sorted(due) if sequence in self._messages]
        for sequence in gone:
            self._expire_one(sequence, now_ms)
        return len(gone)

    def _expire_one(self, sequence: int, now_ms: int) -> None:
        message = self._remove(sequence)
        marker_s = self.config.subject_delete_marker_ttl // 1_000_000_000
        is_last = message.subject not in self._subjects
        if marker_s and is_last and not message.header(MARKER_HEADER):
            headers = {MARKER_HEADER: "MaxAge", TTL_HEADER: format_ttl(marker_s), ROLLUP_HEADER: "sub"}
            self._store(message.subject, b"", headers, now_ms)

    # -- atomic batches

    def abandon_batches(self) -> None:
        """A restart forgets what was staged."""
        self._batches.clear()

    def _publish_in_batch(self, message: Message, now_ms: int) -> tuple[int, dict[str, object]] | None:
        self._check_size(message)
        batch_id, commit = message.header(BATCH_ID_HEADER), message.header(BATCH_COMMIT_HEADER)
        if not self.config.allow_atomic:
            raise BusError(BATCH_DISABLED, "atomic publish is disabled")
        if len(batch_id) > _BATCH_ID_CHARS_MAX:
            raise BusError(BATCH_ID_INVALID, "atomic publish batch ID is invalid")
        batch = self._stage(batch_id, message, now_ms)
        if commit not in ("", "1", "eob"):
            del self._batches[batch_id]
            raise BusError(BATCH_COMMIT_INVALID, "atomic publish batch commit is invalid")
        if not commit:
            return None
        del self._batches[batch_id]
        messages = batch.messages if commit == "1" else batch.messages[:-1]
        return self._commit(messages, now_ms), {"batch": batch_id, "count": len(messages)}

    def _stage(self, batch_id: str, message: Message, now_ms: int) -> _Batch:
        self._forget_idle_batches(now_ms)
        number = message.header(BATCH_SEQUENCE_HEADER)
        if not number:
            raise BusError(BATCH_SEQUENCE_MISSING, "atomic publish sequence is missing")
        batch = self._batches.get(batch_id)
        if batch is None and int(number) == 1:
            if len(self._batches) >= BATCHES_MAX:
                raise BusError(BATCHES_TOO_MANY, "atomic publish too many inflight")
            batch = self._batches[batch_id] = _Batch()
        if int(number) > BATCH_MESSAGES_MAX + (message.header(BATCH_COMMIT_HEADER) == "eob"):
            self._batches.pop(batch_id, None)
            raise BusError(BATCH_TOO_LARGE, f"atomic publish batch is too large: {BATCH_MESSAGES_MAX}")
        if batch is None or int(number) != len(batch.messages) + 1:
            self._batches.pop(batch_id, None)
            raise BusError(BATCH_INCOMPLETE, "atomic publish batch is incomplete")
        batch.messages.append(message)
        batch.last_ms = now_ms
        return batch

    def _forget_idle_batches(self, now_ms: int) -> None:
        for batch_id, batch in list(self._batches.items()):
            if now_ms - batch.last_ms > BATCH_IDLE_MS_MAX:
                del self._batches[batch_id]

    def _commit(self, messages: list[Message], now_ms: int) -> int:
        """Check every message before the first is stored: one refused message refuses all.

        Unlike for a single message the room in all is looked at first, and a replaced message makes none.
        """
        staged: dict[str, int] = {}
        subjects = []
        size = self.bytes
        for count, message in enumerate(messages, 1):
            subject = self._check(message, staged)
            staged[subject] = staged.get(subject, 0) + 1
            size += _stored_bytes(message)
            self._check_room_in_all(len(self._messages) + count, size)
            self._check_room_of_subject(len(self._subjects.get(subject, ())) + staged[subject])
            subjects.append(subject)
        for subject, message in zip(subjects, messages, strict=True):
            self._store(subject, message.data, message.headers, now_ms)
        return self.last_sequence


def check_config(config: StreamConfig) -> None:
    """Raises BusError for what the server refuses too."""
    fault = ""
    if config.discard_new_per_subject and config.discard != "new":
        fault = "discard new per subject requires discard new policy to be set"
    elif config.discard_new_per_subject and config.max_msgs_per_subject <= 0:
        fault = "discard new per subject requires max msgs per subject > 0"
    elif 0 < config.subject_delete_marker_ttl < 1_000_000_000:
        fault = "subject delete marker TTL must be at least 1 second"
    if fault:
        raise BusError(INVALID_CONFIG, fault)


def as_reported(config: StreamConfig) -> dict[str, object]:
    """The configuration with the server's own names and every default spelled out."""
    fields: dict[str, object] = msgspec.structs.asdict(config)
    if config.subject_transform is None:
        del fields["subject_transform"]
    return fields
