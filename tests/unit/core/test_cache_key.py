"""Digests over fields that never run together."""

import hashlib

import pytest

from kong_token_exchange.core.cache_key import digest_fields

DISTINCT: list[list[str | list[str] | None]] = [
    [],
    [None],
    [""],
    [[]],
    [[""]],
    ["a"],
    [["a"]],
    ["a", None],
    [None, "a"],
    ["a", ""],
    ["", "a"],
    ["a", []],
    ["ab"],
    ["a", "b"],
    [["a", "b"]],
    [["ab"]],
    [["a"], ["b"]],
    ["a", ["b"]],
    [["a"], "b"],
    ["a|b"],
    ["a\0b"],
    ["b", "a"],
    [["b", "a"]],
    ["n"],
    ["t" + "\0" * 7 + "\1a"],
    ["A"],
    ["é"],
    ["e\u0301"],
    ["\ud800"],
    ["\udc00"],
    ["\ud83d\ude00"],
    ["😀"],
]


def test_cache_02_different_fields_have_different_digests() -> None:
    digests = [digest_fields(fields) for fields in DISTINCT]
    assert len(set(digests)) == len(DISTINCT)
    assert {len(digest) for digest in digests} == {32}


def test_same_fields_have_the_same_digest() -> None:
    for fields in DISTINCT:
        assert digest_fields(fields) == digest_fields(tuple(fields))
    assert digest_fields([["a", "b"]]) == digest_fields([("a", "b")]) == digest_fields([iter("ab")])


def test_encoding_is_stable() -> None:
    # Keys of a shared cache outlive the process that wrote them.
    material = b"t" + (1).to_bytes(8, "big") + b"a" + b"n" + b"l" + (1).to_bytes(8, "big") + b"t" + bytes(8)
    assert digest_fields(["a", None, [""]]) == hashlib.sha256(material).digest()


@pytest.mark.parametrize("part", ["prefix", "suffix", "signature"])
def test_tokens_that_share_a_part_have_different_keys(part: str) -> None:
    one, other = {
        "prefix": ("h.p.s1", "h.p.s2"),
        "suffix": ("h1.p.s", "h2.p.s"),
        "signature": ("h.p1.s", "h.p2.s"),
    }[part]
    assert digest_fields(("identity", one)) != digest_fields(("identity", other))
