"""A certificate in a header is one digest, and anything else is none."""

import base64
import datetime as dt
import hashlib
import ssl
from functools import cache
from typing import Any
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from kong_token_exchange.protocol.certificate import (
    MAX_CERTIFICATE_BYTES,
    CertificateFormat,
    certificate_digest,
    header_of,
)

KEY = ec.generate_private_key(ec.SECP256R1())
PRIVATE_PEM = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@cache
def certificate(name: str = "client") -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=3650))
        .sign(KEY, hashes.SHA256())
    )


DER = certificate().public_bytes(Encoding.DER)
PEM = certificate().public_bytes(Encoding.PEM).decode()
OTHER_PEM = certificate("other").public_bytes(Encoding.PEM).decode()
DIGEST = base64.urlsafe_b64encode(hashlib.sha256(DER).digest()).rstrip(b"=").decode()
B64 = base64.b64encode(DER).decode()


def test_the_digest_is_what_openssl_calls_the_fingerprint() -> None:
    assert certificate().fingerprint(hashes.SHA256()) == base64.urlsafe_b64decode(DIGEST + "=")
    assert ssl.PEM_cert_to_DER_cert(PEM) == DER


@pytest.mark.parametrize(
    ("text", "form"),
    [
        pytest.param(quote(PEM, safe=""), "url_encoded", id="nginx"),
        # AWS leaves these as they are, and a plus is a plus.
        pytest.param(quote(PEM, safe="+=/"), "url_encoded", id="aws"),
        pytest.param(quote(PEM + OTHER_PEM, safe=""), "url_encoded", id="chain"),
        pytest.param(quote(PEM.replace("\n", "\r\n"), safe=""), "url_encoded", id="crlf"),
        pytest.param(quote(PEM.rstrip("\n"), safe=""), "url_encoded", id="no-newline"),
        pytest.param(B64, "base64_encoded", id="der"),
        pytest.param(base64.b64encode(PEM.encode()).decode(), "base64_encoded", id="pem-in-base64"),
    ],
)
def test_every_way_of_writing_it_is_one_certificate(text: str, form: CertificateFormat) -> None:
    assert DIGEST == certificate_digest(text, form)


@pytest.mark.parametrize("form", ["url_encoded", "base64_encoded"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "(null)",
        quote("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"),
        quote("-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----\n"),
        quote(PEM.replace("BEGIN CERTIFICATE", "BEGIN PUBLIC KEY")),
        quote(PEM)[:-40],
        f"x{quote(PEM)}",
        ", ".join((quote(PEM), quote(OTHER_PEM))),
        f"{B64}, {B64}",
        f":{B64}:",
        B64[:-1],
        "\u00fc",
        "A" * (MAX_CERTIFICATE_BYTES + 4),
    ],
)
def test_anything_else_is_no_certificate(text: str, form: CertificateFormat) -> None:
    assert certificate_digest(text, form) is None


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"x-client-cert": "a"}, "a"),
        ({"x-client-cert": "a", "x_client_cert": "b"}, "a"),
        ({"x_client_cert": "b"}, ""),
        ({"x-client-cert": ["a", "b"]}, ""),
        ({"x-client-cert": True}, ""),
        ({}, ""),
    ],
)
def test_clm_32_the_header_is_the_one_of_exactly_that_name(headers: dict[str, Any], found: str) -> None:
    assert found == header_of(headers, "x-client-cert")
