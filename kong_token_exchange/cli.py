"""
The command `kong-token-exchange`.

    serve      run the plugin server on a unix socket
    ready      tell whether an instance could be started now
    describe   print what Kong's query command reads
    schema     print, write or check the files generated from the schema
    demo       start a gateway, issuers and an upstream on loopback and show each decision

Source: docs/operations.md.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kong_token_exchange import __version__

if TYPE_CHECKING:
    from kong_token_exchange.pluginserver.contract import PluginType


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kong-token-exchange", description="OAuth token exchange at Kong Gateway."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_ready(commands)
    _add_describe(commands)
    _add_schema(commands)
    _add_demo(commands)
    return parser


# --- serve ----------------------------------------------------------------------------


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser("serve", help="run the plugin server on a unix socket")
    serve.add_argument("--socket", required=True, metavar="PATH", help="socket that Kong connects to")
    serve.add_argument(
        "--socket-mode",
        type=lambda text: int(text, 8),
        default=0o600,
        metavar="OCTAL",
        help="permissions of the socket (default: 600); Kong's worker user must be able to connect",
    )
    serve.add_argument("--socket-group", metavar="GROUP", help="group of the socket, by name or number")
    serve.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    serve.add_argument(
        "--exit-with-parent",
        action="store_true",
        help="end when the process that started this one is gone, after a reload not before a successor "
        "listens: for Kong's start_cmd, not for a sidecar",
    )
    serve.add_argument(
        "--threads", type=int, default=64, help="threads for exchanges in each process (default: 64)"
    )
    serve.add_argument(
        "--deadline",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="after so long an event is answered with 504 (default: 10); below Kong's read timeout, 60 s",
    )
    serve.add_argument(
        "--cache-size",
        type=_positive,
        default=128,
        metavar="MIB",
        help="memory for verified and exchanged tokens in each process (default: 128)",
    )
    serve.add_argument(
        "--cache-entries",
        type=_positive,
        default=10_000,
        metavar="N",
        help="verified, and exchanged, tokens in each process (default: 10000)",
    )
    serve.add_argument("--ca-file", metavar="PATH", help="trusted certificates for issuers, PEM")
    serve.add_argument(
        "--resolve",
        action="append",
        default=[],
        type=_resolve_rule,
        metavar="HOST:PORT=ADDRESS:PORT",
        help="reach HOST:PORT at another address, for trying and testing; may be repeated",
    )
    serve.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    serve.set_defaults(run=_run_serve)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected 1 or more")
    return number


def _resolve_rule(text: str) -> tuple[str, tuple[str, int]]:
    name, _, address = text.partition("=")
    host, _, port = address.rpartition(":")
    if not name or not host or not port.isdigit():
        raise argparse.ArgumentTypeError("expected HOST:PORT=ADDRESS:PORT")
    return name, (host.strip("[]"), int(port))


def _run_serve(options: argparse.Namespace) -> int:
    if options.exit_with_parent:
        from kong_token_exchange.pluginserver.keeper import keep  # noqa: PLC0415 - before all that is large

        keep()
    # Imported here: the query command must answer without loading HTTP and cryptography.
    from kong_token_exchange.pluginserver.supervisor import serve_workers  # noqa: PLC0415 - see above
    from kong_token_exchange.shell.clock import SystemClock  # noqa: PLC0415 - see above
    from kong_token_exchange.shell.log_queue import queue_log_lines  # noqa: PLC0415 - see above
    from kong_token_exchange.shell.proof_memory import SharedProofMemory  # noqa: PLC0415 - see above
    from kong_token_exchange.shell.report import report_on_signal  # noqa: PLC0415 - see above
    from kong_token_exchange.wiring import Shells, constant_faults  # noqa: PLC0415 - see above

    # Kong merges both streams into its error log, line by line.
    logging.basicConfig(
        stream=sys.stderr,
        level=options.log_level.upper(),
        format="[token-exchange] %(levelname)s %(name)s: %(message)s",
    )
    # urllib3 logs request lines at debug; they hold no token, but nothing of ours depends on them.
    logging.getLogger("urllib3").setLevel(logging.WARNING)

    # Before the fork: a proof that one worker took is refused by every other.
    proofs = SharedProofMemory(now=SystemClock().now())

    def make_plugin() -> PluginType:
        # In each worker, after the fork: connections, threads and caches are never shared.
        atexit.register(queue_log_lines(logging.getLogger()).stop)
        shells = Shells(
            ca_file=options.ca_file,
            resolve=dict(options.resolve),
            proofs=proofs,
            cache_entries=options.cache_entries,
            cache_bytes=options.cache_size * 1024 * 1024,
        )
        report_on_signal(shells.report)
        return shells.make_plugin(max_deadline_ms=int(options.deadline * 1000))

    try:
        return serve_workers(
            make_plugin,
            workers=options.workers,
            socket_path=options.socket,
            socket_mode=options.socket_mode,
            socket_group=options.socket_group,
            exit_with_parent=options.exit_with_parent,
            threads=options.threads,
            deadline_s=options.deadline,
            faults=constant_faults(),
        )
    except (OSError, ValueError) as exc:
        # A path that cannot be bound, a number that makes no sense: a line, not a traceback.
        print(f"kong-token-exchange serve: {options.socket}: {exc}", file=sys.stderr)
        return 1


# --- ready ----------------------------------------------------------------------------


def _add_ready(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    ready = commands.add_parser("ready", help="exit 0 when an instance could be started now")
    ready.add_argument("--socket", required=True, metavar="PATH", help="socket of the plugin server")
    ready.add_argument("--alive", action="store_true", help="only whether somebody accepts connections")
    ready.add_argument("--timeout", type=float, default=2.0, metavar="SECONDS", help="(default: 2)")
    ready.set_defaults(run=_run_ready)


def _run_ready(options: argparse.Namespace) -> int:
    from kong_token_exchange.pluginserver.ready import is_alive, is_ready  # noqa: PLC0415 - as serve

    probe = is_alive if options.alive else is_ready
    return 0 if probe(options.socket, timeout_s=options.timeout) else 1


# --- describe and schema --------------------------------------------------------------


def _add_describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    describe = commands.add_parser("describe", help="print what Kong's query command reads")
    describe.add_argument(
        "--format",
        choices=["json", "lua"],
        default="json",
        help="json for the query command (default); lua for a control plane without one: schema.lua",
    )
    describe.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="write a file for `query_cmd = cat PATH`; with lua a folder, for schema.lua and handler.lua",
    )
    describe.set_defaults(run=_run_describe)


def _run_describe(options: argparse.Namespace) -> int:
    from kong_token_exchange.pluginserver import describe  # noqa: PLC0415 - a command loads what it needs
    from kong_token_exchange.wiring import Shells  # noqa: PLC0415 - see above

    plugin = Shells().make_plugin()
    lua = options.format == "lua"
    text = describe.schema_lua(plugin) if lua else describe.describe_json(plugin) + "\n"
    output: Path | None = options.output
    if output is None:
        print(text, end="")
    elif lua:
        output.mkdir(parents=True, exist_ok=True)
        (output / "schema.lua").write_text(text, encoding="utf-8")
        (output / "handler.lua").write_text(describe.handler_lua(plugin), encoding="utf-8")
    else:
        output.write_text(text, encoding="utf-8")
    return 0


def _add_schema(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    schema = commands.add_parser("schema", help="print, write or check the files generated from the schema")
    action = schema.add_mutually_exclusive_group()
    action.add_argument(
        "--write", action="store_true", help="write schema.json and docs/configuration.md here"
    )
    action.add_argument("--check", action="store_true", help="fail unless both are in step")
    schema.set_defaults(run=_run_schema)


def _run_schema(options: argparse.Namespace) -> int:
    from kong_token_exchange import schema  # noqa: PLC0415 - a command loads what it needs

    schema_path, page_path = Path("schema.json"), Path("docs/configuration.md")
    if options.write:
        schema.write_files(schema_path, page_path)
        return 0
    if not options.check:
        print(schema.json_schema_text(), end="")
        return 0
    page = page_path.read_text(encoding="utf-8")
    stale = [
        path
        for path, in_step in (
            (schema_path, schema_path.read_text(encoding="utf-8") == schema.json_schema_text()),
            (page_path, schema.insert_reference(page) == page),
        )
        if not in_step
    ]
    for path in stale:
        print(f"{path} is not in step with kong_token_exchange/schema.py: kong-token-exchange schema --write")
    return 1 if stale else 0


# --- demo -----------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser("demo", help="show each decision end to end")
    demo.add_argument(
        "--config", type=Path, default=Path("kong.yml"), metavar="PATH", help="Kong's configuration"
    )
    demo.add_argument(
        "--gateway",
        choices=["sandbox", "compose"],
        default="sandbox",
        help="embedded (default), or what docker/compose.yml has started: make up",
    )
    demo.add_argument(
        "--idp",
        choices=["sandbox", "keycloak"],
        help="identity provider (default: the gateway's own: sandbox, or keycloak with compose)",
    )
    demo.add_argument("--json", type=Path, metavar="PATH", help="also write the rows as JSON")
    demo.set_defaults(run=_run_demo)


def _run_demo(options: argparse.Namespace) -> int:
    try:
        from kong_token_exchange.sandbox.demo import run_demo  # noqa: PLC0415 - needs the extra
    except ModuleNotFoundError as exc:
        if exc.name != "yaml":
            raise
        print("the demo needs the extra: pip install 'kong-token-exchange[sandbox]'", file=sys.stderr)
        return 2
    return run_demo(
        config=options.config,
        gateway=options.gateway,
        identity_provider=options.idp,
        json_path=options.json,
    )
