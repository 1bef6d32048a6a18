"""`toque worker`: parses the options of one pod and runs it. Needs no extra, so that a plain install can serve.

`inspect` is its small sister, for `toque dev`: it imports an APP in a process of its own and says what is in it.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import msgspec
import uvloop

from toque._app import load_app
from toque._durations import to_ms
from toque._names import POD_LENGTH_MAX, check_account, check_pod
from toque.cli.output import EXIT_OK
from toque.errors import UsageError
from toque.storage.nats_options import resolve_options
from toque.workers.pod import PodOptions, run_pod
from toque.workflow import workflow_version

GRACE_DEFAULT: Final = "25s"
SLOTS_DEFAULT: Final = 10_000
SNAPSHOT_AFTER_MIB: Final = 16.0
SNAPSHOT_AFTER_MIB_MAX: Final = 65_536
THREADS_DEFAULT: Final = 32
DATA_DEFAULT: Final = Path("toque-data")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `toque worker --help` shows the options")  # self.prog may be `toque` alone


def run(arguments: Sequence[str]) -> int:
    """Run `worker …` or `inspect …`. Raises ToqueError."""
    parsed = parser().parse_args(arguments)
    return _inspect(parsed.app) if parsed.command == "inspect" else _serve(parsed)


def _serve(parsed: argparse.Namespace) -> int:
    options = pod_options(parsed)
    return uvloop.run(run_pod(load_app(parsed.app), options))


def _inspect(reference: str) -> int:
    app = load_app(reference)
    versions = {name: workflow_version(cls) for name, cls in app.workflows.items()}
    print(msgspec.json.encode({"workflows": versions, "files": [str(file) for file in app.files]}).decode())
    return EXIT_OK


# -- options -----------------------------------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="toque", add_help=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    inspect = commands.add_parser("inspect")
    inspect.add_argument("app")
    worker = commands.add_parser(
        "worker", description="Run one pod: it takes stations of its account and runs instances of APP's workflows "
        "until SIGTERM, then hands over. Several pods of one account share the work.",
        epilog="example: toque worker census:Census --nats nats://127.0.0.1:4222 --pod blue --data /var/lib/toque/blue")
    _add_pod(worker)
    _add_server(worker)
    return parser


def _add_pod(worker: argparse.ArgumentParser) -> None:
    add = worker.add_argument
    add("app", metavar="APP", help="module, module:Class, file.py or file.py:Class")
    add("--pod", metavar="NAME", default=os.environ.get("TOQUE_POD"),
        help="name of the pod, unique in its account and the same after a restart (TOQUE_POD; default: host's name)")
    add("--data", metavar="DIR", type=Path, default=os.environ.get("TOQUE_DATA"),
        help=f"directory of this pod alone (TOQUE_DATA; default: {DATA_DEFAULT}/ACCOUNT/POD)")
    add("--account", metavar="NAME", default=os.environ.get("TOQUE_ACCOUNT", "main"),
        help="account to serve (TOQUE_ACCOUNT; default: main)")
    add("--grace", metavar="TIME", default=GRACE_DEFAULT,
        help=f"how long SIGTERM lets callbacks run before they are cut (default: {GRACE_DEFAULT})")
    add("--slots", metavar="N", type=int, default=SLOTS_DEFAULT,
        help=f"most instances that run here at once (default: {SLOTS_DEFAULT:,})")
    add("--threads", metavar="N", type=int, default=THREADS_DEFAULT,
        help=f"most synchronous callbacks that run here at once (default: {THREADS_DEFAULT})")
    add("--snapshot-after", metavar="MIB", type=float, default=SNAPSHOT_AFTER_MIB,
        help="take a snapshot of a station when its journal has grown by so much, or by the last one's size, if that is "
             f"more; the journal behind the second newest one goes (default: {SNAPSHOT_AFTER_MIB:g})")
    add("--log", choices=["text", "json"], default="text", help="form of the log lines on stderr (default: text)")
    add("--ttl", metavar="TIME", help=argparse.SUPPRESS)
    add("--dev", action="store_true", help=argparse.SUPPRESS)


def _add_server(worker: argparse.ArgumentParser) -> None:
    add = worker.add_argument_group("NATS server").add_argument
    add("--nats", metavar="URL", help="default: NATS_URL, a running `toque dev`, a NATS context, nats://127.0.0.1:4222")
    add("--context", metavar="NAME", help="NATS context to take the address and credentials from")
    add("--creds", metavar="FILE", help="NATS credentials file")
    add("--tls-ca", metavar="FILE", help="certificate authority that the server's certificate must come from")
    add("--tls-cert", metavar="FILE", help="own certificate")
    add("--tls-key", metavar="FILE", help="own private key")
    add("--monitor", metavar="URL", default=os.environ.get("NATS_MONITOR_URL"),
        help="the server's monitoring address (NATS_MONITOR_URL): only there it says whether it syncs every write")
    add("--require-sync", action="store_true",
        help="refuse a server that does not sync every write, or of which that is not known")


def pod_options(parsed: argparse.Namespace) -> PodOptions:
    """The options of `toque worker`, checked. Raises UsageError, SetupError."""
    account = check_account(parsed.account)
    pod = check_pod(parsed.pod or host_pod())
    return PodOptions(
        pod=pod, data=parsed.data or DATA_DEFAULT / account / pod, account=account,
        nats=resolve_options(url=parsed.nats, context=parsed.context, credentials=parsed.creds, tls_ca=parsed.tls_ca,
                             tls_cert=parsed.tls_cert, tls_key=parsed.tls_key),
        grace_s=to_ms(parsed.grace, what="--grace") / 1000, monitor_url=parsed.monitor,
        require_sync=parsed.require_sync, slots_max=_positive(parsed.slots, "--slots"),
        threads_max=_positive(parsed.threads, "--threads"),
        ttl_s=None if parsed.ttl is None else to_ms(parsed.ttl, what="--ttl", minimum_ms=1) / 1000,
        snapshot_after_bytes=_snapshot_after(parsed.snapshot_after), log_json=parsed.log == "json", dev=parsed.dev)


def host_pod() -> str:
    """The host's name as a pod's: what is illegal there becomes a dash."""
    name = re.sub("[^a-zA-Z0-9_-]", "-", socket.gethostname())[:POD_LENGTH_MAX].lstrip("-")
    return name or "pod"


def _snapshot_after(mib: float) -> int:
    if not 0.01 <= mib <= SNAPSHOT_AFTER_MIB_MAX:
        raise UsageError(f"--snapshot-after must be between 0.01 and {SNAPSHOT_AFTER_MIB_MAX:,} MiB, not {mib:g}")
    return int(mib * 1024 * 1024)


def _positive(value: int, option: str) -> int:
    if value < 1:
        raise UsageError(f"{option} must be at least 1, not {value}")
    return value
