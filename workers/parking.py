"""What a parked message holds: the body as it came, the headers that a retry needs, why it is parked, and from where.

It must always be storable (protocol rules R1 and 17), whatever came: a message that cannot be parked would stand at the
head of its station for ever. So no header is kept that the server would obey, and what does not fit is cut and said so.
"""

from __future__ import annotations

from toque._subjects import CUT_HEADER, ORIGIN_HEADER, PARKING_HEADERS, REASON_HEADER, SERVER_HEADERS
from toque.storage.ports import Headers, Message
from toque.storage.records import MESSAGE_RESERVE

HEADER_BYTES_MAX = MESSAGE_RESERVE // 2  # of kept headers; the rest is for the reason and the subject


def parked(message: Message, reason: str, max_payload: int) -> tuple[bytes, Headers]:
    """Body and headers of the parked message. `max_payload`: what the server takes, in bytes."""
    headers, lacks = _kept(message.headers or {})
    room = max_payload - MESSAGE_RESERVE
    if len(message.data) > room:
        lacks = [*lacks, f"the body was cut to {room} of {len(message.data)} bytes"]
    if lacks:
        headers[CUT_HEADER] = "; ".join(lacks)
    return message.data[:room], {**headers, REASON_HEADER: reason, ORIGIN_HEADER: message.subject}


def _kept(headers: Headers) -> tuple[dict[str, str], list[str]]:
    """The sender's own headers, and what is lacking of them. Those that the server reads are never wanted again."""
    own = {name: text for name, text in headers.items()
           if not name.lower().startswith(SERVER_HEADERS) and name not in PARKING_HEADERS}
    size = sum(len(name) + len(text.encode(errors="replace")) for name, text in own.items())
    if size > HEADER_BYTES_MAX or not all(map(_storable, own, own.values())):
        return {}, ["its headers were left out: too large, or not printable"]
    return own, []


def _storable(name: str, text: str) -> bool:
    """Whether it comes back as it was; a line end in a text, say, would begin another header."""
    return name.isascii() and name.isprintable() and not set(name) & {" ", ":"} and text.isprintable()
