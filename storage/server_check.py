"""Whether a nats-server is fit for Toque: its version, JetStream, and whether it fsyncs before it acknowledges.

The server tells its fsync setting nowhere but at its HTTP monitor (/varz); without that address it stays unknown.
"""

from __future__ import annotations

import asyncio
import re
import urllib.request
from enum import Enum
from typing import Protocol

import msgspec

from toque._logging import get_logger
from toque.errors import SetupError, UsageError

SERVER_VERSION_MIN = (2, 12, 0)
MONITOR_S_MAX = 5.0
_VARZ_BYTES_MAX = 4 * 1024 * 1024

_log = get_logger("toque.server")


class SyncState(Enum):
    """When the server writes acknowledged messages to the disk."""

    ALWAYS = "always"  # before it acknowledges
    LAZY = "lazy"  # some time after: a power cut loses acknowledged work
    UNKNOWN = "unknown"  # nobody told the monitor's address


class CheckedBus(Protocol):
    """What the check needs of a bus."""

    @property
    def server_version(self) -> str: ...

    async def require_jetstream(self) -> None: ...


def parse_version(text: str) -> tuple[int, int, int]:
    """The first version number in a text such as "nats-server: v2.15.1". Raises ValueError when there is none."""
    match = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise ValueError(f"no version in {text!r}")
    return int(match[1]), int(match[2]), int(match[3])


def version_text(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


async def check_server(bus: CheckedBus, monitor_url: str | None = None, require_sync: bool = False) -> SyncState:
    """Refuse a server that is too old or has no JetStream; find out, and log, whether it fsyncs always.

    Raises SetupError; with `require_sync` also for a lazy or unknown setting.
    """
    found = parse_version(bus.server_version)
    if found < SERVER_VERSION_MIN:
        raise SetupError(f"the server is nats-server {version_text(found)}; "
                         f"Toque needs {version_text(SERVER_VERSION_MIN)} or newer")
    await bus.require_jetstream()
    state = await asyncio.to_thread(_read_sync_state, monitor_url) if monitor_url else SyncState.UNKNOWN
    if state is SyncState.ALWAYS:
        return state
    text = _complaint(state)
    if require_sync:
        raise SetupError(text)
    _log.warning("server may lose acknowledged work", reason=text)
    return state


def _complaint(state: SyncState) -> str:
    if state is SyncState.LAZY:
        return ("the server acknowledges before it writes to the disk: a power cut loses acknowledged work; "
                "set sync_interval: always in its jetstream block")
    return ("unknown whether the server writes to the disk before it acknowledges: "
            "name its HTTP monitor with --monitor URL")


class _JetStreamConfig(msgspec.Struct):
    sync_always: bool = False


class _JetStream(msgspec.Struct):
    config: _JetStreamConfig | None = None


class _Varz(msgspec.Struct):
    jetstream: _JetStream | None = None


def _read_sync_state(monitor_url: str) -> SyncState:
    address = f"{monitor_url.rstrip('/')}/varz"
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"the monitor's address must begin with http:// or https://, not {monitor_url!r}")
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business in between
        with opener.open(address, timeout=MONITOR_S_MAX) as answer:
            varz = msgspec.json.decode(answer.read(_VARZ_BYTES_MAX), type=_Varz)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise SetupError(f"no nats-server monitor answers at {address}: {error}") from error
    if varz.jetstream is None or varz.jetstream.config is None:
        raise SetupError(f"the server at {address} has no JetStream")
    return SyncState.ALWAYS if varz.jetstream.config.sync_always else SyncState.LAZY
