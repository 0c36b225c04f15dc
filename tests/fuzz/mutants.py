"""
Good tokens changed a little, and what plugin and flow make of them: never anything but a refusal.

Each way of changing is a function from a source of chance and the good tokens to a text; what
comes out equal to a good token is thrown away. Not among them is the second signature that ECDSA
gives for the same content, n - s instead of s: it changes nothing that was signed, and whoever
verifies ECDSA accepts it (tests/fuzz/test_mutants.py has that).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kong_token_exchange.plugin import TokenExchangePlugin
from tests.support.minting import FakeIssuer, b64, public_pem, to_json, with_member
from tests.unit.test_flow import CONFIG, PARTNER, TARGET, Bench, forger, partner, target

Chance = random.Random


@dataclass(frozen=True)
class Good:
    """A token that passes, taken apart."""

    token: str
    issuer: FakeIssuer
    alg: str

    @property
    def parts(self) -> list[str]:
        return self.token.split(".")

    @property
    def header(self) -> dict[str, Any]:
        return self._json(0)

    @property
    def payload(self) -> dict[str, Any]:
        return self._json(1)

    def with_parts(self, **parts: str) -> str:
        """Return the token with `header`, `payload` or `signature` replaced, as text."""
        names = ("header", "payload", "signature")
        return ".".join(parts.get(name, old) for name, old in zip(names, self.parts, strict=True))

    def with_header(self, **members: Any) -> str:
        return self.with_parts(header=b64(to_json({**self.header, **members})))

    def _json(self, index: int) -> dict[str, Any]:
        return json.loads(unb64(self.parts[index]))


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def good_tokens() -> list[Good]:
    """Return tokens of two issuers and every family of algorithms, each of which passes."""
    found = []
    for issuer in (target, partner):
        for alg in ("RS256", "PS256", "ES256", "ES512", "EdDSA"):
            token = issuer.mint(key=alg, aud=["gateway", "other"], jti=f"{alg}-1")
            found.append(Good(token, issuer, alg))
    return found


# --- ways to change a token -----------------------------------------------------------

Change = Callable[[Chance, Good, Sequence[Good]], str]


def flip_a_bit(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    data = bytearray(good.token, "ascii")
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data.decode("latin-1")


def flip_a_decoded_bit(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    parts = good.parts
    index = chance.randrange(3)
    data = bytearray(unb64(parts[index]))
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    parts[index] = b64(bytes(data))
    return ".".join(parts)


def truncate(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    cut = chance.randrange(1, len(good.token))
    parts = good.parts
    index = chance.randrange(3)
    parts[index] = parts[index][: chance.randrange(len(parts[index]))]
    return chance.choice([good.token[:cut], good.token[cut:], ".".join(parts), ".".join(good.parts[:2])])


def swap_segments(chance: Chance, good: Good, others: Sequence[Good]) -> str:
    return ".".join(chance.choice([good, *others]).parts[index] for index in chance.choices(range(3), k=3))


def mix_segments(chance: Chance, good: Good, others: Sequence[Good]) -> str:
    parts = good.parts
    index = chance.randrange(3)
    parts[index] = chance.choice(others).parts[index]
    return ".".join(parts)


def say_it_differently(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    """Write header or payload as other JSON of the same meaning."""
    name, document = chance.choice([("header", good.header), ("payload", good.payload)])
    members = list(document.items())
    chance.shuffle(members)
    text = json.dumps(dict(members), separators=chance.choice([(",", ":"), (", ", ": "), (" ,\n", "\t:")]))
    match chance.randrange(5):
        case 0:
            text = " " + text + "\n"
        case 1:
            text = text.replace("a", "\\u0061")
        case 2:
            text = text.replace("/", "\\/")
        case 3:
            text = text.replace("00000000", "00000000.0")
        case _:
            text = text.replace(": ", ":  ")
    return good.with_parts(**{name: b64(text.encode())})


def name_twice(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    name, document = chance.choice([("header", good.header), ("payload", good.payload)])
    member = chance.choice(list(document))
    value = chance.choice([document[member], "none", None, 9_999_999_999, ["gateway"]])
    data = with_member(document, member, json.dumps(value))
    if chance.randrange(2):
        # The attacker's first, the good one last.
        data = b'{"%s":%s,' % (member.encode(), to_json(value)) + to_json(document)[1:]
    return good.with_parts(**{name: b64(data)})


UNICODE = [
    "\u0430",
    "\u200b",
    "\ufeff",
    "\uff21",
    "\u0131",
    "\x00",
    "\ud800",
    "\u2024",
    "\u3002",
    "\x7f",
    "\xad",
]


def put_unicode_in(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    place = chance.randrange(len(good.token) + 1)
    return good.token[:place] + chance.choice(UNICODE) + good.token[place + chance.randrange(2) :]


def spell_base64_differently(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    parts = good.parts
    index = chance.randrange(3)
    part = parts[index]
    place = chance.randrange(len(part) + 1)
    parts[index] = chance.choice(
        [
            part + "=" * (-len(part) % 4 or 1),
            part.replace("-", "+").replace("_", "/"),
            part[:-1] + chance.choice("ABCDwxyz0189-_"),
            part[:place] + chance.choice([" ", "\n", "\r\n", "\t", "%2E", "=", "\0"]) + part[place:],
            b64(part.encode()),
            base64.b64encode(unb64(part)).decode(),
            base64.b16encode(unb64(part)).decode(),
            part.swapcase(),
        ]
    )
    return ".".join(parts)


def swap_the_algorithm(chance: Chance, good: Good, others: Sequence[Good]) -> str:
    known = ["none", "None", "NONE", "", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256"]
    known += ["ES384", "ES512", "ES256K", "EdDSA", "Ed25519", "RS1", "HS256", "rs256", "RS256 ", "dir"]
    token = good.with_header(alg=chance.choice([*known, None, 0, True, ["RS256"], {"alg": "RS256"}]))
    if chance.randrange(3) == 0:
        return token.rpartition(".")[0] + "."
    return token


def sign_with_the_public_key(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    """Take the public key, in some spelling, for the secret of an HMAC."""
    key = good.issuer.keys[good.alg]
    secrets = [public_pem(key.private), public_pem(key.private).strip(), to_json(key.jwk()), b"", b"secret"]
    name = chance.choice(["HS256", "HS384", "HS512", good.alg])
    digest = {"HS384": hashlib.sha384, "HS512": hashlib.sha512}.get(name, hashlib.sha256)
    signing_input = good.with_header(alg=name).rpartition(".")[0]
    return f"{signing_input}.{b64(hmac.digest(chance.choice(secrets), signing_input.encode(), digest))}"


def swap_the_key_id(chance: Chance, good: Good, others: Sequence[Good]) -> str:
    kids: list[Any] = [other.header["kid"] for other in others]
    kids += ["../../etc/passwd", "' OR 1=1 --", "", None, 0, "x" * 5000, "*", "__proto__", "\r\nX: y"]
    return good.with_header(kid=chance.choice(kids))


def change_a_claim(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    changes: list[dict[str, Any]] = [
        {"exp": 9_999_999_999},
        {"sub": "admin"},
        {"aud": "*"},
        {"iss": chance.choice([TARGET, PARTNER, TARGET + "/", "https://evil.test", [TARGET], None])},
        {"scope": "openid read admin"},
        {"azp": "gateway"},
        {"jti": str(chance.random())},
        {"admin": True},
    ]
    return good.with_parts(payload=b64(to_json({**good.payload, **chance.choice(changes)})))


def change_the_signature(chance: Chance, good: Good, others: Sequence[Good]) -> str:
    signature = unb64(good.parts[2])
    half = len(signature) // 2
    other = unb64(chance.choice(others).parts[2])
    changed = chance.choice(
        [
            b"",
            b"\0" * len(signature),
            b"\0" + signature,
            signature + b"\0",
            signature[1:],
            signature[::-1],
            signature[half:] + signature[:half],
            b"\x30" + bytes([len(signature) % 128]) + signature,
            b"\xff" * len(signature),
            other,
            hashlib.sha256(signature).digest(),
            chance.randbytes(len(signature)),
        ]
    )
    return good.with_parts(signature=b64(changed))


def bring_a_key(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    """Sign with a key of our own, and offer it in every place that a header has for one."""
    key = forger.keys[good.alg]
    members: dict[str, Any] = chance.choice(
        [
            {},
            {"jwk": key.jwk()},
            {"jku": "https://evil.test/keys"},
            {"x5u": "https://evil.test/cert"},
            {"x5c": [base64.b64encode(public_pem(key.private)).decode()]},
            {"kid": key.kid, "jwk": key.jwk()},
            {"kid": None},
        ]
    )
    return forger.craft(to_json({**good.header, **members}), unb64(good.parts[1]), key=key)


def add_a_header_member(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    members: list[dict[str, Any]] = [
        {"crit": ["exp"]},
        {"crit": []},
        {"b64": False},
        {"zip": "DEF"},
        {"enc": "A128GCM"},
        {"cty": "JWT"},
        {"p2c": 2**31},
        {"typ": "logout+jwt"},
    ]
    return good.with_header(**chance.choice(members))


def edit_a_character(chance: Chance, good: Good, _: Sequence[Good]) -> str:
    place = chance.randrange(len(good.token))
    letter = chance.choice("ABCZabcz0189-_.")
    before, after = good.token[:place], good.token[place:]
    return chance.choice([before + letter + after, before + after[1:], before + letter + after[1:]])


def wrap(chance: Chance, good: Good, others: Sequence[Good]) -> str:
    header, payload, signature = good.parts
    general = {"payload": payload, "signatures": [{"protected": header, "signature": signature}]}
    other = chance.choice(others).token
    return chance.choice(
        [
            json.dumps({"protected": header, "payload": payload, "signature": signature}),
            json.dumps(general),
            f"{good.token}.",
            f".{good.token}",
            f"{header}..{signature}",
            f"{good.token}..",
            f"{good.token}.{other}",
            f'"{good.token}"',
            f"Bearer {good.token}",
            f"{good.token}, {other}",
            f"{good.token},",
            f"{header}.{b64(good.token.encode())}.{signature}",
        ]
    )


CHANGES: tuple[Change, ...] = (
    flip_a_bit,
    flip_a_decoded_bit,
    truncate,
    swap_segments,
    mix_segments,
    say_it_differently,
    name_twice,
    put_unicode_in,
    spell_base64_differently,
    swap_the_algorithm,
    sign_with_the_public_key,
    swap_the_key_id,
    change_a_claim,
    change_the_signature,
    bring_a_key,
    add_a_header_member,
    edit_a_character,
    wrap,
)


def mutants(chance: Chance, goods: Sequence[Good]) -> Iterator[tuple[str, str]]:
    """Yield (way of changing, text) without end; never one of *goods*."""
    tokens = {good.token for good in goods}
    while True:
        for change in CHANGES:
            good = chance.choice(goods)
            text = change(chance, good, [other for other in goods if other is not good])
            if text not in tokens:
                yield change.__name__, text


# --- the plugin -----------------------------------------------------------------------


class AcceptedError(AssertionError):
    """A changed token got through."""


class Recorder:
    """A PDK object for the pool: answers with one header, and keeps what it was told at the end."""

    def __init__(self, header: str, path: str = "", calls: list[tuple[str, Any]] | None = None) -> None:
        self._header, self._path = header, path
        self.calls: list[tuple[str, Any]] = [] if calls is None else calls

    def __getattr__(self, name: str) -> Recorder:
        return Recorder(self._header, f"{self._path}.{name}".lstrip("."), self.calls)

    def __call__(self, *arguments: Any) -> str:
        self.calls.append((self._path, arguments))
        return self._header if arguments == ("authorization",) else ""


class Gate:
    """
    The plugin over the real flow, warm: each good token has been exchanged, is cached, and its answer stands.

    So a mutant meets everything that remembers good tokens: the answers that stand (`lease`), the
    verified subject tokens, the exchanged ones.
    """

    def __init__(self) -> None:
        self.bench = Bench()
        plugin = TokenExchangePlugin(lambda _: self.bench.flow, self.bench.clock)
        self._instance: Any = plugin.start(CONFIG)
        self.goods = good_tokens()
        for good in self.goods:
            assert self._status(good.token) is None
            # Judged once more, and from then on answered without.
            assert self._warm_status(good.token) == self._warm_status(good.token) == (True, None)
        self._exchanges = self.bench.exchanges

    def judge(self, text: str) -> str:
        """
        Return the reason of the refusal of what stands behind `Bearer`.

        Raises:
            AcceptedError: there was none.
            AssertionError: it was answered by anything but 400, 401 or 403.
            BaseException: whatever else came out of it; there must not be any.
        """
        self.bench.audit.events.clear()
        answered, status = self._warm_status(text)
        if not answered:
            status = self._status(text)
        if status is None:
            raise AcceptedError(text)
        assert status in (400, 401, 403), status
        return str(self.bench.audit.events[-1].reason)

    def check_nothing_was_asked(self) -> None:
        """Require that no mutant has reached the token endpoint, and that good tokens still pass."""
        assert self._exchanges == self.bench.exchanges
        for good in self.goods:
            assert self._warm_status(good.token) == (True, None)
        assert self._exchanges == self.bench.exchanges

    def _warm_status(self, text: str) -> tuple[bool, int | None]:
        """Return whether the loop answers, and with which exit status; None where the request goes on."""
        facts = {"header": f"Bearer {text}", "method": "GET"}
        outcome = self._instance.warm([facts.get(kind, "") for kind in self._instance._kinds])
        return outcome is not None, outcome.status if outcome is not None else None

    def _status(self, text: str) -> int | None:
        """Return the exit status of the pool; None where the request goes on."""
        kong = Recorder(f"Bearer {text}")
        self._instance.access(kong)
        exits = [arguments[0] for path, arguments in kong.calls if path == "response.exit"]
        return exits[0] if exits else None


def run(count: int, seed: int) -> dict[str, Counter[str]]:
    """Judge *count* mutants; return the refusals by way of changing and reason."""
    gate = Gate()
    found: dict[str, Counter[str]] = {change.__name__: Counter() for change in CHANGES}
    stream = mutants(random.Random(seed), gate.goods)
    for _ in range(count):
        kind, text = next(stream)
        found[kind][gate.judge(text)] += 1
    gate.check_nothing_was_asked()
    return found
