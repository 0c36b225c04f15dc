"""A secret prints redacted, wherever it is put."""

import copy
import hashlib
import json
import pickle
from dataclasses import dataclass

import pytest

from kong_token_exchange.secret import Secret

VALUE = "s3cr3t-MARK"
SECRET = Secret(VALUE)


@dataclass(frozen=True)
class Holder:
    secret: Secret


@pytest.mark.parametrize(
    "shown",
    [
        str(SECRET),
        repr(SECRET),
        f"{SECRET}",
        f"{SECRET!r}",
        f"{SECRET!s:>20}",
        "%s %r" % (SECRET, SECRET),  # noqa: UP031 - the spelling of logging
        "{} {!r}".format(SECRET, SECRET),  # noqa: UP032 - another spelling
        repr([SECRET]),
        repr({"a": SECRET}),
        repr(Holder(SECRET)),
        repr(ValueError(SECRET)),
        str(ValueError(SECRET)),
        ascii(SECRET),
        repr(dir(SECRET)),
    ],
)
def test_secret_prints_redacted(shown: str) -> None:
    assert "MARK" not in shown


def test_secret_shows_a_constant_whatever_it_holds() -> None:
    assert {repr(Secret(value)) for value in ("", "a", VALUE)} == {"Secret(***)"}


def test_reveal_gives_the_value() -> None:
    assert SECRET.reveal() == VALUE


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_secret_is_not_pickled(protocol: int) -> None:
    with pytest.raises(TypeError, match="not serialised"):
        pickle.dumps(SECRET, protocol)
    with pytest.raises(TypeError, match="not serialised"):
        pickle.dumps(Holder(SECRET), protocol)


def test_secret_is_not_copied_nor_written_as_json() -> None:
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            copied(SECRET)
    with pytest.raises(TypeError) as caught:
        json.dumps({"a": SECRET})
    assert "MARK" not in str(caught.value)


def test_secret_has_no_dict_to_print() -> None:
    with pytest.raises(TypeError):
        vars(SECRET)
    with pytest.raises(AttributeError):
        SECRET.other = VALUE  # type: ignore[attr-defined]


def test_secrets_are_equal_by_value_and_to_nothing_else() -> None:
    assert Secret(VALUE) == SECRET
    assert hash(Secret(VALUE)) == hash(SECRET)
    assert Secret("other") != SECRET
    assert VALUE != SECRET
    assert SECRET != VALUE
    assert {SECRET, Secret(VALUE)} == {SECRET}


@pytest.mark.parametrize(("value", "truth"), [("", False), ("a", True), ("0", True), (" ", True)])
def test_empty_secret_is_false(value: str, truth: bool) -> None:
    assert bool(Secret(value)) is truth


@pytest.mark.parametrize("value", ["", "a", "é", chr(0xD800), chr(0xDCFF)])
def test_digest_is_the_sha256_of_any_value(value: str) -> None:
    assert Secret(value).digest() == hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest()
    assert isinstance(hash(Secret(value)), int)
