"""The options that every command with a client has: which server, which account. One table of them for all commands."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from typer import Context, Option

from toque.client import Client, Connecting, TlsFiles
from toque.errors import UsageError

NAME: Final = "toque-cli"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Where to connect to, and for which account; None = see `Client.connect`."""

    nats: str | None
    context: str | None
    creds: Path | None
    tls: TlsFiles
    account: str

    def client(self) -> Connecting:
        """A client, to be entered. Raises SetupError, BrokerUnavailable that names the address and where it is from."""
        return Client.connect(self.nats, account=self.account, credentials=self.creds, tls=self.tls,
                              context=self.context, name=NAME)


def connection_options(
    nats: Annotated[str | None, Option(
        "--nats", metavar="URL", help="NATS server [default: NATS_URL, a running `toque dev`, a NATS context, "
        "nats://127.0.0.1:4222]")] = None,
    context: Annotated[str | None, Option("--context", metavar="NAME", help="NATS context to use")] = None,
    creds: Annotated[Path | None, Option("--creds", metavar="FILE", help="NATS credentials file")] = None,
    tls_ca: Annotated[Path | None, Option("--tls-ca", metavar="FILE", help="certificate authority")] = None,
    tls_cert: Annotated[Path | None, Option("--tls-cert", metavar="FILE", help="own certificate")] = None,
    tls_key: Annotated[Path | None, Option("--tls-key", metavar="FILE", help="own private key")] = None,
    account: Annotated[str, Option("--account", metavar="NAME", envvar="TOQUE_ACCOUNT", help="account")] = "main",
) -> Connection:
    """The parameters of this function are the options; its result is what a command gets as `connection`."""
    tls = TlsFiles(ca=tls_ca, cert=tls_cert, key=tls_key)
    return Connection(nats=nats, context=context, creds=creds, tls=tls, account=account)


def with_connection(command: Callable[..., Coroutine[Any, Any, int]], *, in_account: bool = True) -> Callable[..., int]:
    """A command line function of an async one: its parameter `connection` becomes the options above.

    A command that is not `in_account` acts on the server, or on an account that it is given: it has no --account.
    """
    own = inspect.signature(command, eval_str=True).parameters
    shared = {name: parameter for name, parameter in inspect.signature(connection_options, eval_str=True).parameters.items()
              if in_account or name != "account"}

    def call(**values: Any) -> int:
        given = {name: values.pop(name) for name in shared}
        return asyncio.run(command(connection=connection_options(**given), **values))

    own_ones = [parameter for name, parameter in own.items() if name != "connection"]
    return _as_command(call, command, [*own_ones, *shared.values()])


def without_connection(command: Callable[..., Coroutine[Any, Any, int]]) -> Callable[..., int]:
    """A command line function of an async one that has no client."""

    def call(**values: Any) -> int:
        return asyncio.run(command(**values))

    return _as_command(call, command, inspect.signature(command, eval_str=True).parameters.values())


def _as_command(call: Callable[..., int], command: Callable[..., Any],
                parameters: Iterable[inspect.Parameter]) -> Callable[..., int]:
    """Give it the name, the text and the parameters that typer reads."""
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]  # what typer reads
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword_only}
    call.__doc__ = command.__doc__
    call.__name__ = command.__name__
    return call


def alone(command: Callable[..., int]) -> Callable[..., int]:
    """What a group of commands does by itself, when none of its commands is named.

    Options before a command of the group are the command's, unless it is given them too. Raises UsageError for one that
    the command does not have.
    """
    own = inspect.signature(command)

    def call(invocation: Context, **values: Any) -> int:
        if invocation.invoked_subcommand is None:
            return command(**values)
        sources = {name: invocation.get_parameter_source(name) for name in values}
        given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        chosen = invocation.invoked_subcommand
        known = {parameter.name for parameter in invocation.command.commands[chosen].params}  # type: ignore[attr-defined]
        for name in given:
            if name not in known:
                raise UsageError(f"--{name.replace('_', '-')} is no option of {chosen!r}")
        invocation.default_map = {chosen: {name: getattr(values[name], "value", values[name]) for name in given}}
        return 0

    first = inspect.Parameter("invocation", inspect.Parameter.KEYWORD_ONLY, annotation=Context)
    call.__signature__ = own.replace(parameters=[first, *own.parameters.values()])  # type: ignore[attr-defined]
    call.__annotations__ = {"invocation": Context, **command.__annotations__}
    call.__doc__ = command.__doc__
    call.__name__ = command.__name__
    return call
