"""What of one station's messages in a stream is committed: seen to by accepted records, in stream order."""

from __future__ import annotations

from collections import deque


class StreamPosition:
    """Messages are under way from `begin` to `accepted`, and handled from there on until they are purged."""

    def __init__(self) -> None:
        self.handled: deque[int] = deque()  # sequences that are committed and still in the stream
        self._under_way: dict[int, bool] = {}  # in stream order: sequence → accepted

    def __contains__(self, sequence: int) -> bool:
        """Whether it is under way."""
        return sequence in self._under_way

    @property
    def under_way(self) -> bool:
        """Whether a record is not accepted yet."""
        return bool(self._under_way)

    @property
    def oldest(self) -> int:
        """The first message under way; 0 = none is."""
        return next(iter(self._under_way), 0)

    def begin(self, sequence: int) -> None:
        """Its record is being made. Messages begin in stream order."""
        self._under_way[sequence] = False

    def accepted(self, sequence: int) -> None:
        """Its record stands in the journal."""
        self._under_way[sequence] = True
        while self._under_way:
            oldest = next(iter(self._under_way))
            if not self._under_way[oldest]:
                return
            del self._under_way[oldest]
            self.handled.append(oldest)

    def purged(self, first_sequence: int) -> None:
        """The stream begins at this sequence now."""
        while self.handled and self.handled[0] < first_sequence:
            self.handled.popleft()

    def forget_stream(self) -> None:
        """The stream was made anew, and counts from its start again. Call it with nothing under way."""
        assert not self._under_way, "records that carry sequences of the old stream are not accepted yet"
        self.handled.clear()
