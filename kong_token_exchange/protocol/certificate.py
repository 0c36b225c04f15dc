"""
A client certificate as text: in a header of a proxy that ended TLS, or as nginx knows it.

Nothing of the certificate is read: who ended TLS has seen that the client holds its key, and the
token says which certificate it has to be. So a digest is all that is made of it.

Source: RFC 8705 section 3; nginx `$ssl_client_escaped_cert`; Kong openid-connect
`proof_of_possession_mtls_from_header`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

CertificateFormat = Literal["url_encoded", "base64_encoded"]

# Two certificates of RSA 4,096 with long names have under 8 KB, and half as much again when escaped.
MAX_CERTIFICATE_BYTES = 16 * 1024

_FIRST_PEM = re.compile(rb"\s*-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")


def certificate_digest(text: str, form: CertificateFormat) -> str | None:
    """
    Return `x5t#S256` of a certificate, None where there is none that can be read.

    Args:
        text: Percent-encoded PEM, of which the first certificate is the client's (a chain may
            follow); or base64 of DER or PEM.
        form: Which of the two it is.
    """
    if not text or len(text) > MAX_CERTIFICATE_BYTES or not text.isascii():
        return None
    # Two headers in one line: an escaped certificate has no comma, and neither has base64.
    if "," in text:
        return None
    der = _pem_to_der(unquote_to_bytes(text)) if form == "url_encoded" else _base64_to_der(text)
    if not der:
        return None
    return base64.urlsafe_b64encode(hashlib.sha256(der).digest()).rstrip(b"=").decode("ascii")


def header_of(headers: Mapping[str, Any], name: str) -> str:
    """
    Return the one header of exactly this name; "" for none or several.

    Names are compared with their hyphens: a proxy that sets or removes `X-Client-Cert` may let
    `X_Client_Cert` through, which nginx's variables take for the same.

    Args:
        headers: All headers by lower-case name; a list where there are several of one.
        name: Lower case.
    """
    value = headers.get(name)
    return value if isinstance(value, str) else ""


def _base64_to_der(text: str) -> bytes | None:
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
    return _pem_to_der(data) if data.startswith(b"-----BEGIN") else data


def _pem_to_der(pem: bytes) -> bytes | None:
    match = _FIRST_PEM.match(pem)
    if match is None:
        return None
    try:
        return base64.b64decode(b"".join(match[1].split()), validate=True)
    except binascii.Error:
        return None
