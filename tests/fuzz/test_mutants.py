"""Ten thousand changed tokens through the real flow: each is refused, and nothing else comes of it."""

from __future__ import annotations

import random
import sys
from collections import Counter

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.fuzz import mutants
from tests.support.minting import raw_signature

COUNT = 10_000

# The order of the base point of P-256 (SEC 2, section 2.4.2).
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def test_jwt_41_ten_thousand_mutated_tokens_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    found = mutants.run(COUNT, seed=41)

    reasons: Counter[str] = sum(found.values(), Counter())
    assert COUNT == reasons.total()
    # Every way was taken often, and not all ended at the first check.
    assert min(counts.total() for counts in found.values()) > COUNT // 40
    assert len(reasons) > 8
    with capsys.disabled():
        sys.stdout.write(f"\n{COUNT} mutated tokens: none accepted; {dict(reasons.most_common())}\n")


def test_the_gate_lets_good_tokens_through_and_tells() -> None:
    gate = mutants.Gate()
    asked = gate.bench.keys.asked.copy()
    for good in gate.goods:
        with pytest.raises(mutants.AcceptedError):
            gate.judge(good.token)
    # None of them was judged again: the mutants meet the shortest way that there is.
    assert asked == gate.bench.keys.asked


def test_every_way_of_changing_gives_something_else() -> None:
    goods = mutants.good_tokens()
    chance = random.Random(1)
    for change in mutants.CHANGES:
        good = goods[0]
        texts = {change(chance, good, goods[1:]) for _ in range(50)}
        assert texts - {good.token for good in goods}, change.__name__


def test_jwt_41_the_other_s_of_ecdsa_signs_the_same_and_nothing_else() -> None:
    """What is signed is untouched: the same caller, with the same claims, and an entry of its own."""
    gate = mutants.Gate()
    good = next(good for good in gate.goods if good.alg == "ES256")
    signature = mutants.unb64(good.parts[2])
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    assert isinstance(good.issuer.keys["ES256"].private, ec.EllipticCurvePrivateKey)
    other = good.with_parts(signature=mutants.b64(raw_signature(r, P256_ORDER - s, size=32)))
    assert other != good.token

    assert gate.bench.run(other).subject == gate.bench.run(good.token).subject
