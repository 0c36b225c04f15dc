"""
JSON as strictly as a security boundary needs it.

Python's reader takes NaN, numbers that overflow, repeated member names (last one
wins), a byte-order mark, UTF-16 and lone surrogates; each of these lets two readers
see two different tokens. This one refuses them all.

Source: RFC 8259; RFC 7515 section 4 (unique header names); RFC 7519 section 4.
"""

from __future__ import annotations

import json
import math
from typing import NoReturn

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

# Tokens, key sets and token responses of every provider surveyed nest at most 5 deep.
MAX_DEPTH = 32


class JsonError(ValueError):
    """The bytes are not strict JSON; the caller knows what that means."""


def _refuse_constant(_name: str) -> NoReturn:
    raise JsonError("constant")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError("overflow")
    return value


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise JsonError("duplicate_member")
    return members


_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)


def parse_json(data: bytes, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> Json:
    """
    Read one JSON text.

    Args:
        data: The bytes, UTF-8.
        max_bytes: Longer input is refused before it is decoded.
        max_depth: Deeper nesting is refused.

    Raises:
        JsonError: not strict JSON, too long or too deep.
    """
    if len(data) > max_bytes:
        raise JsonError("too_long")
    try:
        text = data.decode("utf-8")
        value: Json = _decoder.decode(text)
    except JsonError:
        raise
    except (ValueError, RecursionError):
        raise JsonError("malformed") from None
    if data.count(b"[") + data.count(b"{") > max_depth or b"\\u" in data:
        _check_tree(value, max_depth)
    return value


def parse_json_object(data: bytes, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> dict[str, Json]:
    """
    Read one JSON text that must be an object.

    Raises:
        JsonError: as `parse_json`, or not an object.
    """
    value = parse_json(data, max_bytes=max_bytes, max_depth=max_depth)
    if not isinstance(value, dict):
        raise JsonError("not_an_object")
    return value


def _check_tree(root: Json, max_depth: int) -> None:
    # Own stack instead of recursion: the depth is what is being judged.
    stack: list[tuple[Json, int]] = [(root, 1)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, dict | list):
            if depth > max_depth:
                raise JsonError("too_deep")
            if isinstance(value, dict):
                for name, member in value.items():
                    _check_text(name)
                    stack.append((member, depth + 1))
            else:
                stack.extend((item, depth + 1) for item in value)


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise JsonError("lone_surrogate") from None
