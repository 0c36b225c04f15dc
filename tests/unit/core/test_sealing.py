"""Sealed values: only the right entry, version and key open them."""

import os

import pytest

from kong_token_exchange.core.sealing import (
    MAX_SEALED_BYTES,
    NONCE_BYTES,
    VERSION,
    SealError,
    derive_seal_key,
    entry_name,
    open_sealed,
    seal,
)
from kong_token_exchange.secret import Secret

OLD = derive_seal_key(Secret("an old secret of thirty-two bytes"))
NEW = derive_seal_key(Secret("a new secret of thirty-two bytes."))
ENTRY, OTHER = b"e" * 32, b"o" * 32
PLAIN = b'{"access_token":"MARKtoken"}'
OVERHEAD = 1 + 4 + NONCE_BYTES + 16


def sealed(plain: bytes = PLAIN, *, entry: bytes = ENTRY, key=OLD) -> bytes:
    return seal(plain, entry=entry, key=key, nonce=os.urandom(NONCE_BYTES))


def flaw_of(data: bytes, *, entry: bytes = ENTRY, keys=(OLD,)) -> str:
    with pytest.raises(SealError) as caught:
        open_sealed(data, entry=entry, keys=keys)
    return caught.value.flaw


@pytest.mark.parametrize("plain", [b"", b"x", PLAIN, bytes(1000)], ids=["empty", "one", "usual", "zeros"])
def test_what_was_sealed_comes_back(plain: bytes) -> None:
    assert plain == open_sealed(sealed(plain), entry=ENTRY, keys=[OLD])


def test_cache_19_nothing_of_the_token_is_readable() -> None:
    data = sealed()

    assert b"MARK" not in data
    assert len(PLAIN) + OVERHEAD == len(data)
    assert VERSION == data[0]


def test_two_seals_of_one_value_differ() -> None:
    assert sealed() != sealed()


class TestRotation:
    def test_every_listed_key_reads(self) -> None:
        for keys in ([NEW, OLD], [OLD, NEW]):
            assert PLAIN == open_sealed(sealed(key=OLD), entry=ENTRY, keys=keys)
            assert PLAIN == open_sealed(sealed(key=NEW), entry=ENTRY, keys=keys)

    def test_a_key_that_is_no_longer_listed_does_not(self) -> None:
        assert "unknown_key" == flaw_of(sealed(key=OLD), keys=[NEW])

    def test_a_key_under_another_ones_id_opens_nothing(self) -> None:
        data = sealed(key=NEW)

        assert "forged" == flaw_of(data[:1] + OLD.id + data[5:])


def test_cache_19_another_entrys_value_is_not_opened() -> None:
    assert "forged" == flaw_of(sealed(entry=OTHER), entry=ENTRY)


@pytest.mark.parametrize("version", [0, VERSION + 1, 255])
def test_cache_19_another_version_is_not_read(version: int) -> None:
    assert "version" == flaw_of(bytes([version]) + sealed()[1:])


def test_every_changed_byte_is_noticed() -> None:
    data = sealed()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        assert flaw_of(bytes(changed)) in ("version", "unknown_key", "forged"), place


def test_every_truncation_is_noticed() -> None:
    data = sealed()
    for length in range(len(data)):
        assert flaw_of(data[:length]) == ("malformed" if length < OVERHEAD else "forged")
    assert "forged" == flaw_of(data + b"x")


@pytest.mark.parametrize(
    ("data", "flaw"),
    [
        (b"\x80\x04\x95cos\nsystem\n" + bytes(40), "version"),
        (b'{"access_token":"another","token_type":"Bearer","expires_in":300}', "version"),
        (bytes(MAX_SEALED_BYTES), "version"),
        (bytes([VERSION]) * (MAX_SEALED_BYTES + 1), "too_large"),
    ],
    ids=["pickle", "json", "largest", "too-large"],
)
def test_cache_19_what_nobody_sealed_is_not_read(data: bytes, flaw: str) -> None:
    assert flaw == flaw_of(data)


def test_what_could_not_be_read_again_is_not_sealed() -> None:
    assert MAX_SEALED_BYTES == len(sealed(bytes(MAX_SEALED_BYTES - OVERHEAD)))
    with pytest.raises(SealError) as caught:
        sealed(bytes(MAX_SEALED_BYTES - OVERHEAD + 1))
    assert "too_large" == caught.value.flaw


def test_cache_11_names_depend_on_the_secret_and_the_entry() -> None:
    names = {entry_name(entry, key=key) for entry in (ENTRY, OTHER) for key in (OLD, NEW)}

    assert 4 == len(names)
    assert all(len(name) == 64 and ENTRY.hex() not in name for name in names)
    assert entry_name(ENTRY, key=OLD) == entry_name(
        ENTRY, key=derive_seal_key(Secret("an old secret of thirty-two bytes"))
    )


def test_keys_print_nothing_secret() -> None:
    assert OLD.sealing.hex() not in repr(OLD)
    assert repr(OLD.sealing) not in repr(OLD)
    assert repr(OLD.naming) not in repr(OLD)
