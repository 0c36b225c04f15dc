"""
Where contenders meet: servers as processes, tokens for them, and runs of the load generator.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.machine import Watch, process_tree, set_affinity
from benchmarks.native import Result, build, run_loadgen
from benchmarks.plugins import NAME, TOKENS_VARIABLE
from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS
from kong_token_exchange.sandbox.issuer import DEFAULT_BASE_URL, Issuer, IssuerServer, internal_realm

ROOT = Path(__file__).resolve().parents[1]

# As many as a busy gateway sees within a minute or so; more would measure the memory, not the server.
TOKENS = 1000
# Of the Authorization header in and out, characters.
HEADER_CHARS = 1024

SOCKETS = 16

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 15.0

# A run during which others took more than this many cores is repeated, while patience lasts.
QUIET_CORES = 0.25
_TRIES = 3
# What all repetitions of one benchmark may take together.
PATIENCE_S = 30.0


# --- tokens ---------------------------------------------------------------------------


def make_header(prefix: str = "") -> str:
    """Return an Authorization header of the usual length that nobody else has."""
    head = f"Bearer {prefix}"
    return head + secrets.token_urlsafe(HEADER_CHARS)[: HEADER_CHARS - len(head)]


def write_tokens(path: Path, rows: Sequence[tuple[str, str, str]]) -> Path:
    """Write a token file of the load generator: kind, incoming header, what is expected."""
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="ascii")
    return path


# --- servers --------------------------------------------------------------------------


class Server:
    """A server process on a unix socket, started and awaited."""

    def __init__(self, command: Sequence[str | Path], socket_path: Path, *, tokens: Path, log: Path) -> None:
        self.socket_path = socket_path
        self._log = log
        # Another tree can be put in front, to compare two versions.
        path = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH"), str(ROOT)) if part)
        environment = {
            **os.environ,
            TOKENS_VARIABLE: str(tokens),
            "PYTHONPATH": path,
            "PYTHONWARNINGS": "ignore",
        }
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=socket_path.parent,
            )
        try:
            self._await_socket()
        except BaseException:
            self.stop()
            raise
        # Of a server with workers all have been started by the time it accepts.
        self.pids = process_tree(self._process.pid)

    def pin(self, cpus: Sequence[int]) -> None:
        """Bind all its threads to *cpus*."""
        self.pids = process_tree(self._process.pid)
        set_affinity(self.pids, cpus)

    def stop(self) -> None:
        """End the process; may be called again."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _await_socket(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(str(self.socket_path))
                return
            time.sleep(0.02)
        raise RuntimeError(f"a server did not start:\n{self._log.read_text(errors='replace')[-2000:]}")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A running server and how the load generator speaks to it."""

    name: str
    server: Server
    tokens: Path
    protocol: str = "pb"
    plugin: str = NAME
    config: str = "{}"
    # Tokens whose first use is no warm one.
    cold_events: int = 0


class Arena:
    """
    A temporary folder with the compiled programs, the tokens and the running servers.

    Args:
        cpu: The CPU that server and generator share in pinned runs; the last one by default.
    """

    def __init__(self, *, cpu: int | None = None) -> None:
        self._stack = contextlib.ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kte-bench-")))
        self.cpus = sorted(os.sched_getaffinity(0))
        self.cpu = self.cpus[-1] if cpu is None else cpu
        self.programs = build(self.folder)
        self.tokens = write_tokens(
            self.folder / "tokens", [("set", make_header(), make_header()) for _ in range(TOKENS)]
        )
        self._started = 0
        self._patience_s = PATIENCE_S

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(self, *arguments: str | Path, tokens: Path | None = None) -> Server:
        """Start a server of `benchmarks.servers`, stopped with the arena."""
        socket_path = self._socket_path()
        command = [sys.executable, "-m", "benchmarks.servers", *arguments, "--socket", socket_path]
        return self._enter(
            Server(command, socket_path, tokens=tokens or self.tokens, log=self.folder / "log")
        )

    def start_floor(self) -> Server:
        """Start the floor server in C."""
        socket_path = self._socket_path()
        command = [self.programs["floor"], socket_path, self.tokens]
        return self._enter(Server(command, socket_path, tokens=self.tokens, log=self.folder / "log"))

    def run(self, contender: Contender, *arguments: str | float, pinned: bool, seconds: float) -> Result:
        """Run the load generator against one server, once."""
        command = [
            *("--socket", str(contender.server.socket_path)),
            *("--tokens", str(contender.tokens)),
            *("--protocol", contender.protocol),
            *("--plugin", contender.plugin),
            *("--config", contender.config),
            *("--cpu-of", ",".join(map(str, contender.server.pids))),
            *("--warmup", "0.2", "--warmup-events", str(contender.cold_events)),
            *("--seconds", str(seconds)),
            *map(str, arguments),
        ]
        return run_loadgen(self.programs["loadgen"], command, cpu=self.cpu if pinned else None)

    def run_quietly(self, contender: Contender, *arguments: str | float, pinned: bool, seconds: float) -> Run:
        """Run the load generator once, and again where others disturbed it."""
        contender.server.pin([self.cpu] if pinned else self.cpus)

        def run() -> Run:
            watch = Watch(contender.server.pids, [self.cpu] if pinned else None)
            result = self.run(contender, *arguments, pinned=pinned, seconds=seconds)
            return Run(result=result, others=watch.others())

        return self.quietest(run)

    def quietest(self, run: Callable[[], Run]) -> Run:
        """Repeat a run that others disturbed; return the least disturbed one."""
        best = run()
        for _ in range(_TRIES - 1):
            if best.others <= QUIET_CORES or self._patience_s <= 0:
                break
            started = time.monotonic()
            tried = run()
            self._patience_s -= time.monotonic() - started
            best = min(best, tried, key=lambda one: one.others)
        return best

    @contextlib.contextmanager
    def issuer(self) -> Iterator[tuple[IssuerServer, Issuer]]:
        """Run the sandbox's issuer, whose tokens outlive any benchmark."""
        realm = internal_realm(f"{DEFAULT_BASE_URL}/realms/partner")
        clients = {**realm.clients, "client-2": replace(realm.clients["client-2"], token_life_s=7200)}
        issuer = Issuer(f"{DEFAULT_BASE_URL}/realms/internal", replace(realm, clients=clients))
        with IssuerServer({"internal": issuer}) as server:
            yield server, issuer

    def token_exchange(self) -> tuple[Contender, Contender]:
        """Start the token-exchange plugin twice, silent and as by default, with all tokens in its cache."""
        server, issuer = self._stack.enter_context(self.issuer())
        minted = (
            # The note makes the header as long as the others' headers are.
            issuer.mint(scopes=["add-client-2-as-audience"], life_s=7200, note=secrets.token_hex(18))
            for _ in range(TOKENS)
        )
        rows = [("learn", f"Bearer {token}", "") for token in minted]
        tokens = write_tokens(self.folder / f"subject-tokens-{self._started}", rows)
        host, port = server.address
        resolve = f"{ISSUER_ADDRESS}={host}:{port}"
        started = []
        for name, flags in (("ours_plugin_warm", ["--silent"]), ("ours_plugin_default", [])):
            contender = Contender(
                name=name,
                server=self.start("plugin", "--resolve", resolve, *flags),
                tokens=tokens,
                plugin="token-exchange",
                config=json.dumps(exchange_config(issuer.issuer)),
                cold_events=TOKENS + SOCKETS,
            )
            self.run(contender, pinned=False, seconds=0.1)
            started.append(contender)
        return started[0], started[1]

    def _socket_path(self) -> Path:
        self._started += 1
        return self.folder / f"{self._started}.socket"

    def _enter(self, server: Server) -> Server:
        return self._stack.enter_context(server)


def exchange_config(issuer: str) -> dict[str, Any]:
    """Return a configuration of the plugin: the first route of `kong.yml`, same issuer."""
    return {
        "issuer": issuer,
        "insecure_allow_http": True,
        "client_id": ["client-2"],
        "client_secret": ["client-2-secret"],
        "auth_methods": ["bearer"],
        "audience_required": ["orders-api"],
        "token_exchange": {
            "grant_type": "token_exchange",
            "subject_token_issuers": [{"issuer": issuer, "conditions": {"has_audience": ["client-2"]}}],
            "request": {"scopes": ["profile", "orders"]},
        },
    }


# --- rounds ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured run, and how many cores others took meanwhile."""

    result: Result
    others: float


@dataclass(slots=True)
class Series:
    """The runs of one contender, one a round."""

    runs: list[Run] = field(default_factory=list)

    def median(self, figure: str) -> float:
        """Return the median over the rounds of one figure of `Result`."""
        return statistics.median(self.values(figure))

    def values(self, figure: str) -> list[float]:
        """Return one figure of every round."""
        return [getattr(run.result, figure) for run in self.runs]

    def ratio(self, other: Series, figure: str) -> float:
        """Return the median of the rounds' ratios: what was measured side by side is compared."""
        pairs = zip(self.values(figure), other.values(figure), strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def alternate(
    measure: dict[str, Callable[[], Run]], *, rounds: int, progress: Callable[[str], None]
) -> dict[str, Series]:
    """Measure every contender once a round, every other round in reverse order."""
    series = {name: Series() for name in measure}
    for number in range(rounds):
        names = list(measure) if number % 2 == 0 else list(reversed(measure))
        for name in names:
            series[name].runs.append(measure[name]())
        progress(f"round {number + 1} of {rounds}")
    return series
