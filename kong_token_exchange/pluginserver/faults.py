"""
What a caller and an operator see when something goes wrong.

A caller sees one of four constant answers. An operator sees one log line with the
exception's class and where it came from, at most once a minute for each place.
The exception's text is left out, and so are local values: both can hold a token.

Source: docs/errors.md; RFC 6750 section 3.1 for the words.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kong_token_exchange.pluginserver.contract import Outcome, exit_with

SERVER_ERROR = b'{"error":"server_error","error_description":"the gateway could not process the request"}'
INVALID_REQUEST = b'{"error":"invalid_request","error_description":"the request is too large"}'
UNAVAILABLE = b'{"error":"temporarily_unavailable","error_description":"the gateway is busy"}'
TIMED_OUT = b'{"error":"temporarily_unavailable","error_description":"the gateway did not answer in time"}'

_JSON = {"Content-Type": "application/json", "Cache-Control": "no-store"}

# One line per place and minute: a fault on every request must not fill Kong's log.
LOG_INTERVAL_S = 60.0
# Distinct places remembered; beyond that the memory is dropped and starts anew.
_MAX_PLACES = 1000
# The innermost frames say where; Kong's log takes one line of 2048 bytes.
_MAX_FRAMES = 6
_MAX_CAUSES = 3


@dataclass(frozen=True, slots=True)
class Faults:
    """The constant answers to faults, encoded."""

    server_error: Outcome
    too_large: Outcome
    overloaded: Outcome
    timed_out: Outcome


def make_faults(
    fault_body: bytes = SERVER_ERROR,
    *,
    too_large_body: bytes = INVALID_REQUEST,
    overloaded_body: bytes = UNAVAILABLE,
    timed_out_body: bytes = TIMED_OUT,
) -> Faults:
    """Encode the four answers: 500, 400, 503 with Retry-After, 504."""
    return Faults(
        server_error=exit_with(500, fault_body, _JSON),
        too_large=exit_with(400, too_large_body, _JSON),
        overloaded=exit_with(503, overloaded_body, {**_JSON, "Retry-After": "1"}),
        timed_out=exit_with(504, timed_out_body, _JSON),
    )


class FaultLog:
    """Write faults to a logger, each place at most once in an interval; count them all."""

    def __init__(
        self,
        logger: logging.Logger,
        *,
        interval_s: float = LOG_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._places: dict[str, tuple[float, int]] = {}
        self.total = 0

    def raised(self, what: str, error: BaseException) -> None:
        """Log *error* by class, file, line and function; never by its text. Never raises."""
        try:
            self.note(f"{what}: {_describe(error)}")
        except BaseException:  # noqa: BLE001 - a MemoryError here must not cost the answer
            self.total += 1

    def note(self, message: str, *, level: int = logging.ERROR) -> None:
        """Log *message*, which is its own place, with the count of those left out since."""
        self.total += 1
        now = self._clock()
        silent_until, left_out = self._places.get(message, (float("-inf"), 0))
        if now < silent_until:
            self._places[message] = (silent_until, left_out + 1)
            return
        if len(self._places) >= _MAX_PLACES:
            self._places.clear()
        self._places[message] = (now + self._interval_s, 0)
        self._logger.log(level, "%s%s", message, f" ({left_out} more since)" if left_out else "")


def _describe(error: BaseException) -> str:
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < _MAX_CAUSES:
        parts.append(f"{type(current).__qualname__} at {_places(current.__traceback__)}")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "; caused by ".join(parts)


def _places(traceback: TracebackType | None) -> str:
    places: list[str] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{traceback.tb_lineno} {code.co_name}")
        # A deep recursion has thousands of frames; only the last ones are shown.
        del places[:-_MAX_FRAMES]
        traceback = traceback.tb_next
    return " > ".join(places) or "an unknown place"
