"""
The product's `serve` command with traps at its seams, for faults that no outside can cause.

Times that are fixed in the product (an hour for stale keys) can be shortened, and each port that
the flow uses, and each entry of the plugin, can be made to raise, hang or end the process. All
of it is done from here; the product has no hook of its own.

    python -m tests.chaos.hooked_server serve --socket PATH ...     with CHAOS_HOOKS=hooks.json

The file has `constants` ("module.NAME": value) and `cache_entries`, which are read at start, and
`trap` ({"step", "do"}) and `clock` (seconds that the wall clock is ahead), which are read whenever
the file changes. libfaketime would move the clock from outside, but breaks Python's timed waits.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from kong_token_exchange import cli, wiring
from kong_token_exchange.config import PluginConfig
from kong_token_exchange.flow import Flow
from kong_token_exchange.plugin import TokenExchangePlugin
from kong_token_exchange.shell.clock import SystemClock
from kong_token_exchange.shell.token_cache import MemoryTokenCache

# The ports of the flow by name, and the methods that are trapped.
PORTS = {
    "clock": ("now", "monotonic"),
    "keys": ("keys", "newer_keys", "token_endpoint"),
    "cache": ("verified", "store_verified", "exchanged", "exchange_once"),
    "sender": ("send",),
    "audit": ("record",),
    "metrics": ("count",),
}
ENTRIES = ("plugin.start", "instance.warm", "instance.access")
STEPS = (*ENTRIES, *(f"{port}.{name}" for port, names in PORTS.items() for name in names))

_EXCEPTIONS: dict[str, type[BaseException]] = {
    error.__name__: error
    for error in (
        RuntimeError,
        KeyError,
        TypeError,
        UnicodeDecodeError,
        RecursionError,
        MemoryError,
        OSError,
        SystemExit,
        KeyboardInterrupt,
        GeneratorExit,
    )
}


class Hooks:
    """What the file says now."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._seen: tuple[int, int] = (0, 0)
        self._trap: dict[str, str] | None = None
        self.constants: dict[str, Any] = {}
        self.cache_entries: int | None = None
        self._clock_offset = 0.0
        self._look()

    def _look(self) -> None:
        status = self._path.stat()
        if self._seen == (status.st_mtime_ns, status.st_ino):
            return
        self._seen = (status.st_mtime_ns, status.st_ino)
        read = json.loads(self._path.read_text(encoding="utf-8"))
        self.constants, self._trap = read.get("constants", {}), read.get("trap")
        self.cache_entries = read.get("cache_entries")
        self._clock_offset = read.get("clock", 0.0)

    def clock_offset(self) -> float:
        self._look()
        return self._clock_offset

    def spring(self, step: str, arguments: tuple[Any, ...]) -> None:
        self._look()
        trap = self._trap
        if trap is None or trap["step"] != step:
            return
        kind, _, detail = trap["do"].partition(":")
        if kind == "hang":
            time.sleep(float(detail))
        elif kind == "exit":
            os._exit(int(detail))
        elif kind == "recurse":
            _recurse(0)
        elif kind == "spin":
            _spin_once(Path(detail))
        else:
            # The text holds whatever the step was given: none of it may be told to anybody.
            raise _make(_EXCEPTIONS[detail], repr(arguments)[:4000])

    def around(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def trapped(*arguments: Any, **named: Any) -> Any:
            self.spring(step, (*arguments, *named.values()))
            return function(*arguments, **named)

        return trapped


def _spin_once(mark: Path) -> None:
    """Never come back, the first time: the gateway sends the event that was lost again."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    while True:
        pass


def _recurse(depth: int) -> int:
    return _recurse(depth + 1) + 1


def _make(kind: type[BaseException], text: str) -> BaseException:
    if kind is UnicodeDecodeError:
        return UnicodeDecodeError("utf-8", text.encode("utf-8", "replace"), 0, 1, text)
    return kind(text)


class _Trapped:
    """A port of the flow with traps before its methods."""

    def __init__(self, target: Any, port: str, hooks: Hooks) -> None:
        for name in PORTS[port]:
            setattr(self, name, hooks.around(f"{port}.{name}", getattr(target, name)))
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def moved_clock(hooks: Hooks) -> type[SystemClock]:
    class MovedClock(SystemClock):
        def now(self) -> float:
            return super().now() + hooks.clock_offset()

    return MovedClock


def trap_flow(hooks: Hooks) -> type[Flow]:
    class TrappedFlow(Flow):
        def __init__(self, config: PluginConfig, **ports: Any) -> None:
            trapped = {name: _Trapped(ports[name], name, hooks) for name in PORTS}
            super().__init__(config, **{**ports, **trapped})

    return TrappedFlow


def trap_shells(hooks: Hooks) -> type[wiring.Shells]:
    class TrappedShells(wiring.Shells):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            if hooks.cache_entries is not None:
                self.cache = MemoryTokenCache(
                    self.clock, metrics=self.metrics, max_entries=hooks.cache_entries
                )

        def make_plugin(self, *arguments: Any, **options: Any) -> TokenExchangePlugin:
            plugin = super().make_plugin(*arguments, **options)
            start = plugin.start

            def trapped_start(*arguments: Any, **named: Any) -> Any:
                hooks.spring("plugin.start", arguments)
                instance: Any = start(*arguments, **named)
                instance.warm = hooks.around("instance.warm", instance.warm)
                instance.access = hooks.around("instance.access", instance.access)
                return instance

            plugin.start = trapped_start  # type: ignore[method-assign]
            return plugin

    return TrappedShells


def main() -> int:
    hooks = Hooks(os.environ["CHAOS_HOOKS"])
    for path, value in hooks.constants.items():
        module_name, _, name = path.rpartition(".")
        module = importlib.import_module(module_name)
        if not hasattr(module, name):
            raise SystemExit(f"chaos: there is no {path}")
        setattr(module, name, value)
    if not {"SystemClock", "Flow"} <= vars(wiring).keys():
        raise SystemExit("chaos: the clock or the flow is made elsewhere now")
    vars(wiring)["SystemClock"] = moved_clock(hooks)
    vars(wiring)["Flow"] = trap_flow(hooks)
    wiring.Shells = trap_shells(hooks)  # type: ignore[misc]
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
