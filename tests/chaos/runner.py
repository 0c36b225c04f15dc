"""Runs rows on one gateway, each to its verdict, whatever the one before has left behind."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Sequence

from tests.chaos.rows import MODES, enter_mode
from tests.chaos.run import Result, Row, Run
from tests.chaos.stage import Stage

# Requests a second of the stream beside each fault.
RATE = 60.0


class Runner:
    """
    Rows on one kind of gateway.

    Args:
        kind: `sandbox` or `kong`.
        long: Full length instead of the scaled one.
        tell: Gets a line for each row.
        deadline: Monotonic instant after which no row is begun.
    """

    def __init__(
        self, kind: str, *, long: bool, tell: Callable[[str], None], deadline: float = float("inf")
    ) -> None:
        self._kind, self._long, self._tell, self._deadline = kind, long, tell, deadline
        self._stage: Stage | None = None
        self._mode = ""
        self.gateway_name = kind

    def run(self, rows: Sequence[Row]) -> list[Result]:
        """Run the rows, by mode, and return their results."""
        results = [self._not_run(row) for row in rows if row.action is None]
        waiting = [row for mode in MODES for row in rows if row.action is not None and row.mode == mode]
        try:
            for row in waiting:
                result = self.run_row(row)
                results.append(result)
                self._tell(line(result))
        finally:
            self.close()
        return results

    def _not_run(self, row: Row) -> Result:
        return Result(row=row, gateway=self._kind, verdict="not run", remarks=[row.reason])

    def run_row(self, row: Row) -> Result:
        """Run one row; the stage stays for the next one, until `close`."""
        if time.monotonic() > self._deadline:
            return Result(
                row=row, gateway=self.gateway_name, verdict="fail", remarks=["no time was left for it"]
            )
        began = time.monotonic()
        try:
            return self._run_on(self._enter(row.mode), row)
        except Exception as error:  # noqa: BLE001 - a row that breaks must not take the others with it
            self.close()
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__} at {where.name}:{where.lineno}: {error}"
            return Result(
                row=row,
                gateway=self.gateway_name,
                verdict="fail",
                remarks=[text[:600]],
                seconds=time.monotonic() - began,
            )

    def _run_on(self, stage: Stage, row: Row) -> Result:
        run = Run(row, stage, long=self._long, rate=RATE)
        run.ready()
        assert row.action is not None
        try:
            row.action(run)
            return run.judge()
        finally:
            stage.client.quiet()
            stage.gateway.write_hooks()

    def _enter(self, mode: str) -> Stage:
        if self._stage is None:
            self._stage = Stage(self._kind)
            self._stage.__enter__()
            self.gateway_name = self._stage.gateway.name
            self._mode = "plain"
        if self._mode != mode:
            enter_mode(self._stage.gateway, mode, long=self._long)
            self._mode = mode
        return self._stage

    def close(self) -> None:
        """Stop everything that was started."""
        stage, self._stage = self._stage, None
        if stage is not None:
            with contextlib.suppress(Exception):
                stage.__exit__()


def line(result: Result) -> str:
    """Return the progress line of one result."""
    marks = {"pass": "ok", "fail": "FAIL", "not yet": "not yet", "not run": "-"}
    text = f"{marks[result.verdict]:<8}{result.row.id:<10} {result.gateway:<18} "
    text += f"{result.seconds:5.1f} s  {result.seen}"
    text += f"  recovery {result.recovery}" if result.recovery else ""
    return "\n".join([text, *(f"            {remark}" for remark in result.remarks)])
