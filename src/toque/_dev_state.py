"""The directory of a `toque dev`: whose it is (directory.json), who runs in it now (dev.json), and its lock.

directory.json stays and marks the directory as ours; it keeps the ports, so that a restart has the same addresses.
dev.json is there only while a `toque dev` lives, for clients in the same place that look for a server.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from toque.errors import SetupError

FORMAT: Final = 1
DEFAULT_DIRECTORY: Final = Path(".toque")
STATE_FILE: Final = "dev.json"
IDENTITY_FILE: Final = "directory.json"
LOCK_FILE: Final = "dev.lock"

_S = TypeVar("_S", bound=msgspec.Struct)


class DevState(msgspec.Struct, kw_only=True):
    """dev.json: where a living `toque dev` runs. Clients read `url` and `pid`."""

    url: str
    monitor_url: str
    pid: int
    app: str
    account: str
    pods: dict[str, int] = {}  # name → process id; 0 = not running just now
    format: int = FORMAT


class DirectoryIdentity(msgspec.Struct, kw_only=True):
    """directory.json: whose directory it is, and the ports that it had last (0 = none yet)."""

    account: str
    port: int = 0
    monitor_port: int = 0
    format: int = FORMAT


class _Format(msgspec.Struct):
    """The only field that is read of a file whose format is not known yet."""

    format: int


# -- who runs in it ----------------------------------------------------------------------------------------------------

def write_state(directory: Path, state: DevState) -> None:
    """Replace dev.json at once: a reader sees the old or the new one whole."""
    _write(directory / STATE_FILE, state)


def remove_state(directory: Path) -> None:
    (directory / STATE_FILE).unlink(missing_ok=True)


# -- whose it is -------------------------------------------------------------------------------------------------------

class DirectoryClaim:
    """The exclusive right to run in a directory, held until `release` or the end of the process."""

    def __init__(self, directory: Path, lock: int, identity: DirectoryIdentity) -> None:
        self.directory = directory
        self.identity = identity
        self._lock = lock

    def remember_ports(self, port: int, monitor_port: int) -> None:
        self.identity = msgspec.structs.replace(self.identity, port=port, monitor_port=monitor_port)
        _write(self.directory / IDENTITY_FILE, self.identity)

    def release(self) -> None:
        """Remove dev.json and let the next one in. Idempotent."""
        if self._lock >= 0:
            remove_state(self.directory)
            os.close(self._lock)
            self._lock = -1


def claim_directory(directory: Path, account: str) -> DirectoryClaim:
    """Make the directory if it is missing, and take it for this process.

    Raises SetupError when a living `toque dev` has it (naming its pid), when it belongs to another account, and when
    a newer format or something else than Toque wrote it. Nothing is changed then.
    """
    check_ours(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory)
    except OSError as error:
        raise SetupError(f"the directory {directory} cannot be used: {error.strerror}") from error
    try:
        identity = _identity(directory, account)
    except BaseException:
        os.close(lock)
        raise
    return DirectoryClaim(directory, lock, identity)


def check_ours(directory: Path) -> None:
    """Raises SetupError unless the directory is missing, empty, or one that `toque dev` made."""
    if directory.exists() and not directory.is_dir():
        raise SetupError(f"{directory} is not a directory: name another with --dir")
    if not directory.is_dir() or (directory / IDENTITY_FILE).is_file():
        return
    left_by_a_crash = {LOCK_FILE, _draft(directory / IDENTITY_FILE).name}
    foreign = sorted({entry.name for entry in directory.iterdir()} - left_by_a_crash)
    if foreign:
        raise SetupError(f"{directory} holds {foreign[0]!r} and was not made by `toque dev`: name another with --dir")


def wipe(directory: Path) -> None:
    """Delete everything in a directory of `toque dev`: instances, checkpoints, settings.

    Raises SetupError, with nothing deleted, when it is not such a directory or a `toque dev` lives in it.
    """
    check_ours(directory)
    if not directory.is_dir():
        return
    lock = _lock(directory)
    try:
        marks_last = sorted(directory.iterdir(), key=lambda entry: entry.name == IDENTITY_FILE)
        for entry in marks_last:  # killed half-way, what is left still counts as ours and can be wiped again
            _delete(entry)
    finally:
        os.close(lock)


def _delete(entry: Path) -> None:
    if entry.name == LOCK_FILE:
        return  # who waits for this very lock must not get one on a deleted file
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _identity(directory: Path, account: str) -> DirectoryIdentity:
    found = _read(directory / IDENTITY_FILE, DirectoryIdentity)
    if found is None:
        found = DirectoryIdentity(account=account)
        _write(directory / IDENTITY_FILE, found)
    if found.account != account:
        raise SetupError(f"{directory} belongs to the account {found.account!r}, not {account!r}: give another with "
                         "--dir, or wipe it with --clean")
    return found


def _lock(directory: Path) -> int:
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode().strip()
        os.close(descriptor)
        raise SetupError(f"a `toque dev` (process {holder or 'unknown'}) runs in {directory} already: stop it, or give "
                         "another directory with --dir") from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


# -- files -------------------------------------------------------------------------------------------------------------

def _read(path: Path, type_: type[_S]) -> _S | None:
    """None when there is no file. Raises SetupError for one of a newer format, or that is no such file at all."""
    try:
        data = path.read_bytes()
        found = msgspec.json.decode(data, type=_Format).format
        if found > FORMAT:
            raise SetupError(f"{path} has format {found}; this version of Toque knows formats up to {FORMAT}: run the "
                             "version that wrote it, or wipe the directory with --clean")
        return msgspec.json.decode(data, type=type_)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, OSError) as error:
        raise SetupError(f"{path} cannot be read ({error}): wipe the directory with --clean") from error


def _write(path: Path, value: msgspec.Struct) -> None:
    draft = _draft(path)
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(value)) + b"\n")
    draft.replace(path)


def _draft(path: Path) -> Path:
    return path.with_suffix(".tmp")
