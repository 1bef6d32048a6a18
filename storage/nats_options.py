"""Where the NATS server is and how to log in: what was asked for, the environment, `toque dev`, a NATS context.

`resolve_options` decides once, reading files but opening no connection; a connection is made from a `NatsOptions`.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from toque.errors import SetupError, UsageError

DEFAULT_URL = "nats://127.0.0.1:4222"
DEV_STATE = Path(".toque") / "dev.json"
CONNECT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class NatsOptions:
    """One NATS server or cluster, and who connects to it. Secrets stay out of `repr`."""

    servers: tuple[str, ...] = field(default=(DEFAULT_URL,), repr=False)
    """Addresses of one cluster; any of them will do."""
    source: str = "the default address"
    """Where the addresses come from, for messages."""
    name: str = "toque"
    """The connection's name in NATS tools."""
    credentials: Path | None = None
    """A .creds file (JWT and seed)."""
    nkey: Path | None = None
    """A file with an nkey seed."""
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    tls_ca: Path | None = None
    """Certificates of the authorities that the server's certificate is checked against, instead of the system's."""
    tls_cert: Path | None = None
    """Our own certificate; needs `tls_key`."""
    tls_key: Path | None = None
    tls_first: bool = False
    """TLS before the server's greeting."""
    inbox_prefix: str = "_INBOX"
    """First tokens of reply subjects: what the account's permissions let us subscribe to."""
    api_prefix: str = "$JS.API"
    """First tokens of JetStream requests: another one for a JetStream domain or an imported API."""
    connect_s: float = CONNECT_S
    """Seconds that one connection attempt may take."""

    @property
    def shown(self) -> str:
        """The addresses without user names, passwords and tokens."""
        return ", ".join(map(_without_login, self.servers))

    def tls_context(self) -> ssl.SSLContext | None:
        """What TLS is to use; None = the system's defaults. Raises SetupError for files that are no certificates."""
        if self.tls_ca is None and self.tls_cert is None:
            return None
        try:
            context = ssl.create_default_context(cafile=self.tls_ca)
            if self.tls_cert is not None:
                context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(path) for path in (self.tls_ca, self.tls_cert, self.tls_key) if path)
            raise SetupError(f"TLS files {files} cannot be used: {error}") from error
        return context


def resolve_options(url: str | None = None, *, context: str | None = None, credentials: Path | str | None = None,
                    tls_ca: Path | str | None = None, tls_cert: Path | str | None = None,
                    tls_key: Path | str | None = None, cwd: Path | None = None) -> NatsOptions:
    """Find the server: `url`, else the `context` that was named, else NATS_URL, else a running `toque dev` here or
    above, else the selected NATS context (NATS_CONTEXT or `nats context select`), else nats://127.0.0.1:4222.

    Files given here win over those of the context. `url` may be a comma-separated list. Raises SetupError for a file or
    a context that is not there or cannot be read.
    """
    options = _find(url, context, cwd or Path.cwd())
    options = replace(options, credentials=_path(credentials) or options.credentials,
                      tls_ca=_path(tls_ca) or options.tls_ca, tls_cert=_path(tls_cert) or options.tls_cert,
                      tls_key=_path(tls_key) or options.tls_key)
    _check(options)
    return options


def _find(url: str | None, context: str | None, cwd: Path) -> NatsOptions:
    if url:
        return NatsOptions(servers=_addresses(url, "the URL given"), source="the URL given")
    if context:
        return _from_context(context, "the context named")
    if from_environment := os.environ.get("NATS_URL"):
        return NatsOptions(servers=_addresses(from_environment, "NATS_URL"), source="NATS_URL")
    if dev_url := running_dev(cwd):
        return NatsOptions(servers=_addresses(dev_url, "toque dev"), source="the running `toque dev`")
    if named := os.environ.get("NATS_CONTEXT"):
        return _from_context(named, "NATS_CONTEXT")
    if selected := _selected_context():
        return _from_context(selected, "the selected NATS context")
    return NatsOptions()


def _check(options: NatsOptions) -> None:
    for what, path in (("credentials", options.credentials), ("nkey", options.nkey), ("TLS CA", options.tls_ca),
                       ("TLS certificate", options.tls_cert), ("TLS key", options.tls_key)):
        if path is not None and not os.access(path, os.R_OK):
            raise UsageError(f"the {what} file {path} is not there or cannot be read")
    if options.credentials is not None and b"BEGIN NATS USER JWT" not in options.credentials.read_bytes():
        raise UsageError(f"{options.credentials} is no NATS credentials file: it holds no user JWT")
    if (options.tls_cert is None) != (options.tls_key is None):
        raise UsageError("a TLS certificate and its key go together: only one of them was given")


def _addresses(text: str, source: str) -> tuple[str, ...]:
    addresses = tuple(part.strip() for part in text.split(",") if part.strip())
    if not addresses or not all(map(_is_address, addresses)):
        raise UsageError(f"{source} is no NATS address: {_without_login(text)!r}; one looks like {DEFAULT_URL}")
    return addresses


def _is_address(text: str) -> bool:
    scheme, separator, _ = text.partition("://")
    if separator and scheme not in ("nats", "tls"):
        return False
    try:
        parts = urlsplit(text if separator else f"nats://{text}")
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _without_login(address: str) -> str:
    login, at, host = address.rpartition("@")
    if not at:
        return address
    scheme, separator, _ = login.partition("://")
    return f"{scheme}{separator}…@{host}" if separator else f"…@{host}"


# -- toque dev ---------------------------------------------------------------------------------------------------------

class _DevState(msgspec.Struct):
    url: str
    pid: int


def running_dev(cwd: Path) -> str | None:
    """The address of the `toque dev` that runs in this directory or the nearest one above that has a state file."""
    for directory in (cwd, *cwd.parents):
        path = directory / DEV_STATE
        if path.is_file():
            state: _DevState = _decode(path, _DevState, "toque dev's state file")
            if _alive(state.pid):
                return state.url
    return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _decode(path: Path, type_: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_)
    except (OSError, msgspec.MsgspecError) as error:
        raise SetupError(f"{what} {path} cannot be read: {error}") from error


# -- NATS contexts: what `nats context` keeps (ADR-21) -----------------------------------------------------------------

class _Context(msgspec.Struct):
    url: str = ""
    token: str = ""
    user: str = ""
    password: str = ""
    creds: str = ""
    nkey: str = ""
    cert: str = ""
    key: str = ""
    ca: str = ""
    nsc: str = ""
    jetstream_domain: str = ""
    jetstream_api_prefix: str = ""
    inbox_prefix: str = ""
    user_jwt: str = ""
    socks_proxy: str = ""
    tls_first: bool = False


def _contexts_dir() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nats"


def _selected_context() -> str:
    path = _contexts_dir() / "context.txt"
    return path.read_text().strip() if path.is_file() else ""


def _from_context(name: str, source: str) -> NatsOptions:
    if "/" in name or name in (".", ".."):
        raise UsageError(f"{source} {name!r} is no name of a NATS context")
    path = _contexts_dir() / "context" / f"{name}.json"
    if not path.is_file():
        raise UsageError(f"{source} is {name!r}, but there is no {path}: see `nats context ls`")
    context: _Context = _decode(path, _Context, f"NATS context {name!r}")
    for unsupported in ("nsc", "user_jwt", "socks_proxy"):
        if getattr(context, unsupported):
            raise SetupError(f"NATS context {name!r} uses {unsupported}, which Toque cannot: use a creds file instead")
    return NatsOptions(
        servers=_addresses(context.url or DEFAULT_URL, f"the url of NATS context {name!r}"),
        source=f"NATS context {name!r}",
        credentials=_path(context.creds),
        nkey=_path(context.nkey),
        user=context.user or None,
        password=context.password or None,
        token=context.token or None,
        tls_ca=_path(context.ca),
        tls_cert=_path(context.cert),
        tls_key=_path(context.key),
        tls_first=context.tls_first,
        inbox_prefix=context.inbox_prefix or "_INBOX",
        api_prefix=_api_prefix(context),
    )


def _path(text: Path | str | None) -> Path | None:
    return Path(text).expanduser() if text else None


def _api_prefix(context: _Context) -> str:
    if context.jetstream_api_prefix:
        return context.jetstream_api_prefix.rstrip(".")
    return f"$JS.{context.jetstream_domain}.API" if context.jetstream_domain else "$JS.API"
