"""`toque chaos`: runs the scenarios that break things on purpose, against a cluster of their own or the user's."""

from __future__ import annotations

import asyncio
import random
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from typer import Argument, Option

from toque._durations import to_ms
from toque.chaos import partition
from toque.chaos.catalog import SCENARIOS, scenario_named
from toque.chaos.faults import OF_LINK, OF_NETWORK
from toque.chaos.ledger import SOCKET_VARIABLE, Ledger
from toque.chaos.load import Load
from toque.chaos.report import page
from toque.chaos.scenario import Figures, Outcome, RunOptions, Scenario
from toque.chaos.scenario import run as run_scenario
from toque.chaos.soak import KEPT_S, SOAK, Sampler, check_r6, kept_per_instance, planned
from toque.chaos.topology import Refused, Topology
from toque.cli.chaos_cluster import LEDGER_FILE, LEDGER_SOCKET, deployment, own_cluster
from toque.cli.connection import Connection, connection_options
from toque.cli.dev import Stop
from toque.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, console, printable, show_table
from toque.errors import SetupError, UsageError

if TYPE_CHECKING:
    from rich.status import Status

EXIT_VOID: Final = 4  # the faults did not happen, or nothing was seen: the run proves nothing
ALL: Final = "all"
OWN_TTL: Final = "3s"
PLAIN_EVERY_S: Final = 5.0
SEEDS: Final = 1_000_000
DEFAULT_LEDGER: Final = Path("toque-chaos")
SKIPPED: Final = "skipped"


# -- commands ----------------------------------------------------------------------------------------------------------

async def list_scenarios() -> int:
    """List the scenarios: what each does, and what it needs."""
    show_table(["name", "does", "needs"], [(item.name, item.does, item.needs or "–") for item in SCENARIOS.values()])
    return EXIT_OK


async def run(
        connection: Connection,
        name: Annotated[str, Argument(metavar="NAME", help=f"a scenario of `toque chaos list`, or {ALL!r}")],
        seed: Annotated[int | None, Option("--seed", metavar="N", help="repeats a run [default: a new one]")] = None,
        faults: Annotated[int | None, Option("--faults", "--kills", metavar="N", min=1, max=1000,
                                             help="how many faults [default: the scenario's]")] = None,
        instances: Annotated[int | None, Option("--instances", metavar="N", min=1, max=100_000,
                                                help="created before the first fault [default: the scenario's]")] = None,
        limit: Annotated[int | None, Option("--limit", metavar="N", min=1,
                                            help="of the account [default: the scenario's]")] = None,
        callback: Annotated[str | None, Option("--callback", metavar="TIME", help="how long each callback takes; the one "
                                               "in a thread 100 ms at most [default: the scenario's]")] = None,
        lasts: Annotated[float | None, Option("--lasts", metavar="TTLS", min=0.1, max=20.0, help="how long each fault that "
                                              "lasts does, in TTLs [default: drawn for each]")] = None,
        ttl: Annotated[str | None, Option("--ttl", metavar="TIME", help="of the pods' sessions [default: "
                                          f"{OWN_TTL}; with --nats: the account's]")] = None,
        report: Annotated[Path | None, Option("--report", metavar="FILE", help="write an HTML page; a directory takes "
                                              "one for each scenario")] = None,
        directory: Annotated[Path | None, Option("--dir", metavar="DIR", help="where it makes a directory for itself "
                                                 "[default: that of temporary files]")] = None,
        keep: Annotated[bool, Option("--keep", help="keep that directory though all went well")] = False,
        ledger: Annotated[Path, Option("--ledger", metavar="DIR", help="with --nats: of a running `toque chaos "
                                       "ledger`")] = DEFAULT_LEDGER,
        restart: Annotated[bool, Option("--restart", help="with --nats: start what was killed again, as it had been "
                                        "started [default: your supervisor does]")] = False) -> int:
    """Run a scenario and judge it: faults at work, then a verdict for each promise.

    Without --nats it starts a server and pods of its own on this machine. With --nats it works on your deployment:
    the pods serve toque.chaos.five_steps and report to a `toque chaos ledger`. It ends by itself; Ctrl-C ends it early.
    Exit code: 0 pass, 1 violated, 4 void (the faults did not happen, nothing was seen), 2 wrong usage.

    \b
    Examples:
      toque chaos run killing-pods --seed 1
      toque chaos run all --seed 1 --report chaos-reports/
    """
    chosen = [scenario_named(name)] if name != ALL else sorted(SCENARIOS.values(), key=_is_parted)
    seed = random.SystemRandom().randrange(SEEDS) if seed is None else seed
    options = ChaosOptions(
        connection=connection, seed=seed, faults=faults, instances=instances, limit=limit, report=report,
        callback_ms=None if callback is None else to_ms(callback, what="--callback"), lasts_ttls=lasts,
        ttl_s=None if ttl is None else to_ms(ttl, what="--ttl") / 1000, directory=directory, keep=keep, ledger=ledger,
        restart=restart)
    show = ChaosShow()
    show.say(f"seed {seed}")
    return await _run_all(chosen, options, show)


async def soak(
        minutes: Annotated[float, Option("--minutes", metavar="N", min=0.5, help="how long the work goes on")] = 10.0,
        seed: Annotated[int | None, Option("--seed", metavar="N", help="of the faults [default: a new one]")] = None,
        report: Annotated[Path | None, Option("--report", metavar="FILE", help="write an HTML page")] = None,
        directory: Annotated[Path | None, Option("--dir", metavar="DIR", help="as of `toque chaos run`")] = None,
        keep: Annotated[bool, Option("--keep", help="keep that directory though all went well")] = False) -> int:
    """Work for minutes on a cluster of its own, with faults, and see whether anything grows.

    Memory, file descriptors, threads, consumers, subscriptions and the journal must be flat. Exit codes as of run.
    """
    seed = random.SystemRandom().randrange(SEEDS) if seed is None else seed
    options = ChaosOptions(connection=connection_options(), seed=seed, faults=None, instances=None, limit=None, ttl_s=None,
                           report=report, directory=directory, keep=keep, ledger=DEFAULT_LEDGER, restart=False,
                           minutes=minutes)
    show = ChaosShow()
    show.say(f"seed {seed}")
    return await _run_all([SOAK], options, show)


async def keep_ledger(
        directory: Annotated[Path, Option("--dir", metavar="DIR", help="where it writes")] = DEFAULT_LEDGER) -> int:
    """Keep a ledger for `toque chaos run --nats`, until Ctrl-C; say how the pods are to be started."""
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.absolute()
    stop = Stop()
    with await asyncio.to_thread(Ledger.start, directory / LEDGER_FILE) as running:
        link = directory / LEDGER_SOCKET
        link.unlink(missing_ok=True)
        link.symlink_to(running.socket)
        print(f"the ledger is in {directory}; start each pod on this host as\n"
              f"  {SOCKET_VARIABLE}={link} toque worker toque.chaos.five_steps --nats URL --pod NAME --data DIR\n"
              f"then  toque chaos run NAME --nats URL --ledger {directory}\nCtrl-C ends it", flush=True)
        try:
            await stop.asked.wait()
        finally:
            link.unlink(missing_ok=True)
    return EXIT_OK


# -- running -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class ChaosOptions:
    """The options of `toque chaos run`."""

    connection: Connection
    seed: int
    faults: int | None
    instances: int | None
    limit: int | None
    ttl_s: float | None
    callback_ms: int | None = None
    lasts_ttls: float | None = None
    report: Path | None
    directory: Path | None
    keep: bool
    ledger: Path
    restart: bool
    minutes: float = 0.0
    """Of a soak; 0 = a scenario that ends with its last fault."""

    def command(self, scenario: Scenario) -> str:
        """What repeats the run of this scenario."""
        if self.minutes:
            return f"toque chaos soak --seed {self.seed} --minutes {self.minutes:g}"
        given = {"--faults": self.faults, "--instances": self.instances, "--limit": self.limit,
                 "--callback": None if self.callback_ms is None else f"{self.callback_ms} ms", "--lasts": self.lasts_ttls,
                 "--ttl": None if self.ttl_s is None else f"{self.ttl_s:g}s", "--nats": self.connection.nats}
        rest = "".join(f" {option} {shlex.quote(str(value))}" for option, value in given.items() if value is not None)
        return f"toque chaos run {scenario.name} --seed {self.seed}{rest}"

    def page_of(self, scenario: Scenario) -> Path | None:
        """Where its report goes. Made now, so that a bad place is found out before the run."""
        if self.report is None:
            return None
        path = self.report
        if path.suffix != ".html":
            path = path / f"{scenario.name}-seed-{self.seed}.html"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(f"the report cannot be written to {path}: {error.strerror}; name another place") from error
        return path


async def _run_all(scenarios: list[Scenario], options: ChaosOptions, show: ChaosShow) -> int:
    """Each in turn. One that cannot run here is skipped, with the reason; if it is the only one, that is void."""
    words: dict[str, str] = {}
    stop = Stop()
    for scenario in scenarios:
        runner = _Run(scenario, options, show)
        interrupted = await stop.interrupts(runner.run())
        if interrupted:
            show.say("interrupted: what was broken is healed, what was started is ended")
            return EXIT_INTERRUPTED
        words[scenario.name] = runner.word
    if len(scenarios) > 1:
        for name, word in words.items():
            show.say(f"{word:10} {name}")
    return exit_code(words)


def exit_code(words: dict[str, str]) -> int:
    """Of the words of one run, or of several; skipped ones count only when nothing else was run."""
    if "VIOLATED" in words.values():
        return EXIT_FAILED
    ran = [word for word in words.values() if word != SKIPPED]
    return EXIT_OK if ran and set(ran) == {"pass"} else EXIT_VOID


class _Run:
    """One scenario: its directory, its topology, its report."""

    def __init__(self, scenario: Scenario, options: ChaosOptions, show: ChaosShow) -> None:
        self.word = SKIPPED
        self._scenario = scenario
        self._options = options
        self._show = show

    async def run(self) -> None:
        options, show = self._options, self._show
        page_path = options.page_of(self._scenario)
        show.say(f"{self._scenario.name}: {self._scenario.does}")
        directory = _make_directory(options.directory, self._scenario.name)
        keep = True
        try:
            outcome = await self._outcome(directory)
            self.word = outcome.word
            for line in outcome.lines():
                show.say(line)
            if page_path is not None:
                page_path.write_text(page(outcome), encoding="utf-8")
                show.say(f"the report is {page_path}")
            keep = options.keep or not outcome.holds
        except Refused as refusal:
            show.say(f"{self._scenario.name} is skipped: {refusal}")
            keep = False
        finally:
            show.pause()
            if keep:
                show.say(f"log, ledger and data are in {directory}; again: {options.command(self._scenario)}")
            else:
                shutil.rmtree(directory, ignore_errors=True)

    async def _outcome(self, directory: Path) -> Outcome:
        options = self._options
        run_options = RunOptions(
            seed=options.seed, faults=options.faults, instances=options.instances, limit=options.limit,
            callback_ms=options.callback_ms, lasts_ttls=options.lasts_ttls,
            prefix="order" if options.connection.nats is None else f"chaos-{options.seed}-{int(time.time()):x}",
            command=options.command(self._scenario))
        async with self._topology(directory) as topology:
            if options.minutes:
                return await self._soaked(run_options, topology, directory)
            return await run_scenario(self._scenario, run_options, topology, directory=directory, show=self._show)

    async def _soaked(self, options: RunOptions, topology: Topology, directory: Path) -> Outcome:
        """With what the deployment used all the while, judged too."""
        samplers: list[Sampler] = []

        async def sample(load: Load) -> None:
            samplers.append(Sampler(topology, directory / "soak.jsonl", lambda: load.ended))
            await samplers[0].run()

        count, every_s = planned(self._options.minutes)
        options = replace(options, faults=count, every_s=every_s, minutes=self._options.minutes)
        await topology.client.accounts.set(topology.client.account, tombstones_s=KEPT_S)
        outcome = await run_scenario(self._scenario, options, topology, directory=directory, show=self._show,
                                     beside=sample)
        samples = samplers[0].samples
        outcome.judgement.verdicts += (flat := check_r6(samples))
        outcome.judgement.void += [f"{verdict.promise}: too few samples" for verdict in flat if not verdict.checked]
        outcome.judgement.counts += [kept_per_instance(samples) or "LMDB: too few samples"]
        return outcome

    @asynccontextmanager
    async def _topology(self, directory: Path) -> AsyncIterator[Topology]:
        options, kinds = self._options, frozenset(self._scenario.recipe.kinds)
        url = options.connection.nats
        if url is not None:
            async with deployment(options.connection.client, url=url, ledger=options.ledger, ttl_s=options.ttl_s,
                                  restart_log=directory / "restarted.log" if options.restart else None) as topology:
                yield topology
            return
        parted = bool(kinds & OF_NETWORK)
        if parted:
            _enter_namespace()
        with (directory / "pods.log").open("w", encoding="utf-8") as log:
            def hear(who: str, text: str) -> None:
                print(f"{time.monotonic():.3f} {who}: {text}", file=log, flush=True)

            ttl_s = options.ttl_s or to_ms(OWN_TTL, what="TTL") / 1000
            async with own_cluster(directory, ttl_s=ttl_s, links=bool(kinds & OF_LINK), parted=parted,
                                   worker_options=self._scenario.worker_options, hear=hear) as topology:
                yield topology


def _enter_namespace() -> None:
    try:
        partition.enter_namespace()
    except partition.NamespacesAway as error:
        raise Refused(str(error)) from error


def _is_parted(scenario: Scenario) -> bool:
    """Those come last: the namespace that they enter is for the rest of this process's life."""
    return bool(set(scenario.recipe.kinds) & OF_NETWORK)


def _make_directory(base: Path | None, name: str) -> Path:
    try:
        if base is not None:
            base.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"toque-chaos-{name}-", dir=base)).absolute()
    except OSError as error:
        raise UsageError(f"no directory can be made in {base}: {error.strerror}; name another with --dir") from error


# -- showing -----------------------------------------------------------------------------------------------------------

class ChaosShow:
    """Lines, and how far it is: at the bottom of a terminal, else as a line now and then."""

    def __init__(self) -> None:
        self._console = console()
        self._status: Status | None = None
        self._shown_at = 0.0

    def say(self, text: str) -> None:
        self._console.print(printable(text), soft_wrap=True)

    def progress(self, figures: Figures) -> None:
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status("")
                self._status.start()
            self._status.update(str(figures))
        elif time.monotonic() - self._shown_at >= PLAIN_EVERY_S:
            self._shown_at = time.monotonic()
            self.say(f"  {figures}")

    def pause(self) -> None:
        """Take the moving line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None

