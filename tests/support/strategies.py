"""Made-up input for Hypothesis: any JSON, and good documents and bytes spoilt a little."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.support.minting import NOW

any_text = st.text(st.characters(exclude_categories=()), max_size=60)
any_number = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 2**53, NOW, NOW + 300, 0])
)
any_json = st.recursive(
    st.one_of(st.none(), st.booleans(), any_number, any_text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=4)),
    max_leaves=12,
)


def one_of_those_changed(good: dict[str, Any], *more: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return *good* with some members replaced by any JSON, dropped, or joined by strangers."""
    names = st.sampled_from([*good, *more])
    changes = st.dictionaries(st.one_of(names, any_text), any_json, max_size=4)
    dropped = st.sets(names, max_size=2)
    return st.builds(
        lambda changed, gone: {
            name: value for name, value in {**good, **changed}.items() if name not in gone
        },
        changes,
        dropped,
    )


def spoilt(data: bytes) -> st.SearchStrategy[bytes]:
    """Return *data* cut, or with a piece replaced."""
    place = st.integers(0, len(data))
    return st.builds(
        lambda a, b, piece: data[: min(a, b)] + piece + data[max(a, b) :], place, place, st.binary(max_size=6)
    )
