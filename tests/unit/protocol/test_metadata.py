"""KEY rows of discovery: which document is believed, and where it may send us."""

import json

import pytest

from kong_token_exchange.errors import IssuerUnavailableError
from kong_token_exchange.protocol.http_message import HttpResponse
from kong_token_exchange.protocol.metadata import (
    MAX_METADATA_BYTES,
    IssuerMetadata,
    is_acceptable_endpoint,
    is_loopback,
    oauth_metadata_url,
    process_metadata,
)
from tests.support.fakes import json_response

ISSUER = "https://idp.test/realms/a"
URL = ISSUER + "/.well-known/openid-configuration"
JWKS = ISSUER + "/keys"
TOKEN = ISSUER + "/token"
LOCAL_ISSUER = "http://127.0.0.1:8080/realms/a"
LOCAL_URL = LOCAL_ISSUER + "/.well-known/openid-configuration"


def document(**members: object) -> dict[str, object]:
    good: dict[str, object] = {"issuer": ISSUER, "jwks_uri": JWKS, "token_endpoint": TOKEN}
    return {name: value for name, value in {**good, **members}.items() if value is not ...}


def read(response: HttpResponse, *, allow_http: bool = False) -> IssuerMetadata:
    return process_metadata(response, issuer=ISSUER, url=URL, allow_http=allow_http)


def read_local(*, allow_http: bool = False, **members: object) -> IssuerMetadata:
    answer = json_response(document(issuer=LOCAL_ISSUER, **members))
    return process_metadata(answer, issuer=LOCAL_ISSUER, url=LOCAL_URL, allow_http=allow_http)


def refusal(response: HttpResponse, *, allow_http: bool = False) -> IssuerUnavailableError:
    with pytest.raises(IssuerUnavailableError) as caught:
        read(response, allow_http=allow_http)
    return caught.value


def test_a_good_document_is_believed() -> None:
    assert IssuerMetadata(issuer=ISSUER, jwks_uri=JWKS, token_endpoint=TOKEN) == read(
        json_response(document())
    )


def test_members_may_be_missing() -> None:
    metadata = read(json_response({"issuer": ISSUER, "jwks_uri": None}))

    assert (None, None, False) == (
        metadata.jwks_uri,
        metadata.token_endpoint,
        metadata.token_endpoint_foreign,
    )


OTHER_ISSUERS = {
    "KEY-01-other": "https://evil.test/realms/a",
    "KEY-01-other-realm": "https://idp.test/realms/b",
    "KEY-01-slash": ISSUER + "/",
    "KEY-01-case": "https://IDP.test/realms/a",
    "KEY-01-port": "https://idp.test:443/realms/a",
    "KEY-01-http": "http://idp.test/realms/a",
    "KEY-01-prefix": ISSUER[:-1],
    "KEY-01-longer": ISSUER + "b",
    "KEY-01-list": [ISSUER],
    "KEY-01-null": None,
    "KEY-01-absent": ...,
    "KEY-01-empty": "",
    "KEY-01-object": {"issuer": ISSUER},
}


@pytest.mark.parametrize("issuer", OTHER_ISSUERS.values(), ids=OTHER_ISSUERS.keys())
def test_a_document_of_another_issuer_is_refused(issuer: object) -> None:
    error = refusal(json_response(document(issuer=issuer)))

    assert (503, "metadata_issuer_differs", {"expected": ISSUER}) == (error.status, error.reason, error.facts)


BAD_ENDPOINTS = {
    "KEY-03-file": "file:///etc/passwd",
    "KEY-03-ftp": "ftp://idp.test/keys",
    "KEY-03-data": "data:application/json,{}",
    "KEY-03-http": "http://idp.test/keys",
    "KEY-03-http-metadata-address": "http://169.254.169.254/latest/meta-data/",
    "KEY-03-http-loopback": "http://127.0.0.1:8080/keys",
    "KEY-03-http-localhost": "http://localhost/keys",
    "KEY-03-relative": "/keys",
    "KEY-03-no-scheme": "//idp.test/keys",
    "KEY-03-no-host": "https:///keys",
    "KEY-03-user": "https://idp.test@evil.test/keys",
    "KEY-03-user-password": "https://u:p@idp.test/keys",
    "KEY-03-empty-user": "https://@idp.test/keys",
    "KEY-03-fragment": "https://idp.test/keys#x",
    "KEY-03-empty-fragment": "https://idp.test/keys#",
    "KEY-03-backslash": "https://idp.test\\@evil.test/keys",
    "KEY-03-backslash-in-host": "https://evil.test\\.idp.test/keys",
    "KEY-03-space": "https://idp.test/ keys",
    "KEY-03-space-before": " https://idp.test/keys",
    "KEY-03-tab": "https://idp.test/\tkeys",
    "KEY-03-line-break": "https://idp.test/\r\nHost: evil.test",
    "KEY-03-del": "https://idp.test/\x7fkeys",
    "KEY-03-not-ascii": "https://\u0456dp.test/keys",
    "KEY-03-percent-host": "https://idp%2etest/keys",
    "KEY-03-zone": "https://[fe80::1%25eth0]/keys",
    "KEY-03-port": "https://idp.test:99999/keys",
    "KEY-03-port-text": "https://idp.test:https/keys",
    "KEY-03-bracket": "https://[::1/keys",
    "KEY-03-list": [JWKS],
    "KEY-03-number": 1,
    "KEY-03-object": {"url": JWKS},
    "KEY-03-empty": "",
}


@pytest.mark.parametrize("endpoint", BAD_ENDPOINTS.values(), ids=BAD_ENDPOINTS.keys())
@pytest.mark.parametrize("member", ["jwks_uri", "token_endpoint"])
@pytest.mark.parametrize("allow_http", [False, True], ids=["https", "allow-http"])
def test_an_endpoint_that_may_not_be_called_spoils_the_document(
    endpoint: object, member: str, allow_http: bool
) -> None:
    error = refusal(json_response(document(**{member: endpoint})), allow_http=allow_http)

    assert ("metadata_endpoint", {"member": member}) == (error.reason, error.facts)


INSIDE = {
    "KEY-03-link-local": "https://169.254.169.254/latest/meta-data/",
    "KEY-03-loopback": "https://127.0.0.1/keys",
    "KEY-03-loopback-name": "https://localhost/keys",
    "KEY-03-loopback-subdomain": "https://keys.localhost/keys",
    "KEY-03-loopback-six": "https://[::1]/keys",
    "KEY-03-mapped": "https://[::ffff:169.254.169.254]/keys",
    "KEY-03-link-local-six": "https://[fe80::1]/keys",
    "KEY-03-unique-local-six": "https://[fd00:ec2::254]/keys",
    "KEY-03-private": "https://10.0.0.7/keys",
    "KEY-03-carrier": "https://100.100.100.200/keys",
    "KEY-03-unspecified": "https://0.0.0.0/keys",
    "KEY-03-multicast": "https://224.0.0.1/keys",
    "KEY-03-decimal": "https://2130706433/keys",
    "KEY-03-hexadecimal": "https://0x7f000001/keys",
    "KEY-03-hexadecimal-part": "https://127.0.0.0x1/keys",
    "KEY-03-octal": "https://0177.0.0.1/keys",
    "KEY-03-short": "https://127.1/keys",
    "KEY-03-trailing-dot": "https://127.0.0.1./keys",
}


@pytest.mark.parametrize("jwks_uri", INSIDE.values(), ids=INSIDE.keys())
def test_a_document_may_not_send_us_to_an_address_inside_the_network(jwks_uri: str) -> None:
    error = refusal(json_response(document(jwks_uri=jwks_uri)))

    assert "jwks_uri_foreign_host" == error.reason


@pytest.mark.parametrize(
    "jwks_uri",
    [
        "https://www.keys.test/v3/certs",
        "https://idp.test:8443/keys",
        "https://8.8.8.8/keys",
        "https://IDP.TEST/keys",
    ],
    ids=["KEY-03-other-host", "KEY-03-other-port", "KEY-03-public-address", "KEY-03-same-host-by-case"],
)
def test_keys_may_live_on_another_public_host(jwks_uri: str) -> None:
    assert jwks_uri == read(json_response(document(jwks_uri=jwks_uri))).jwks_uri


def test_keys_may_live_inside_the_network_where_the_document_does() -> None:
    url = "https://10.0.0.7/.well-known/openid-configuration"
    answer = json_response({"issuer": "https://10.0.0.7", "jwks_uri": "https://10.0.0.7:443/keys"})

    metadata = process_metadata(answer, issuer="https://10.0.0.7", url=url, allow_http=False)

    assert "https://10.0.0.7:443/keys" == metadata.jwks_uri


@pytest.mark.parametrize(
    "endpoint",
    ["https://evil.test/token", "https://idp.test:8443/token", "https://idp.test.evil.test/token"],
    ids=["KEY-04-other-host", "KEY-04-other-port", "KEY-04-longer-host"],
)
def test_credentials_go_to_no_other_host(endpoint: str) -> None:
    metadata = read(json_response(document(token_endpoint=endpoint)))

    assert (None, True, JWKS) == (
        metadata.token_endpoint,
        metadata.token_endpoint_foreign,
        metadata.jwks_uri,
    )


@pytest.mark.parametrize("endpoint", ["https://idp.test:443/token", "https://IDP.test/token?tenant=a"])
def test_key_04_the_same_host_in_other_words(endpoint: str) -> None:
    assert endpoint == read(json_response(document(token_endpoint=endpoint))).token_endpoint


# --- documents over http --------------------------------------------------------------


def test_a_document_from_loopback_may_name_loopback() -> None:
    metadata = read_local(jwks_uri=LOCAL_ISSUER + "/keys", token_endpoint=LOCAL_ISSUER + "/token")

    assert (LOCAL_ISSUER + "/keys", LOCAL_ISSUER + "/token") == (metadata.jwks_uri, metadata.token_endpoint)


@pytest.mark.parametrize(
    "jwks_uri",
    ["http://127.0.0.1:9090/keys", "https://keys.test/keys"],
    ids=["KEY-03-http-other-port", "KEY-03-http-other-host"],
)
def test_what_came_over_http_may_not_send_us_elsewhere_for_keys(jwks_uri: str) -> None:
    with pytest.raises(IssuerUnavailableError) as caught:
        read_local(jwks_uri=jwks_uri)

    assert "jwks_uri_foreign_host" == caught.value.reason


def test_key_07_plain_http_beyond_loopback_needs_the_switch() -> None:
    issuer = "http://idp.test/realms/a"
    answer = json_response(
        {"issuer": issuer, "jwks_uri": issuer + "/keys", "token_endpoint": issuer + "/token"}
    )
    url = issuer + "/.well-known/openid-configuration"

    with pytest.raises(IssuerUnavailableError) as caught:
        process_metadata(answer, issuer=issuer, url=url, allow_http=False)
    allowed = process_metadata(answer, issuer=issuer, url=url, allow_http=True)

    assert "metadata_endpoint" == caught.value.reason
    assert (issuer + "/keys", issuer + "/token") == (allowed.jwks_uri, allowed.token_endpoint)


# --- documents that are none ----------------------------------------------------------

GOOD = json.dumps(document())

NO_DOCUMENT = {
    "KEY-20-html": b"<html>",
    "KEY-20-list": b"[]",
    "KEY-20-null": b"null",
    "KEY-20-empty": b"",
    "KEY-20-cut": GOOD[:-1].encode(),
    "KEY-20-not-utf-8": b'{"issuer": "\xff"}',
    "KEY-20-duplicate": (GOOD[:-1] + ', "issuer": "https://idp.test/realms/a"}').encode(),
    "KEY-20-deep": b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "KEY-20-nan": b'{"issuer": NaN}',
    "KEY-06-too-long": (GOOD[:-1] + " " * MAX_METADATA_BYTES + "}").encode(),
}


@pytest.mark.parametrize("body", NO_DOCUMENT.values(), ids=NO_DOCUMENT.keys())
def test_what_is_no_document_is_an_outage(body: bytes) -> None:
    error = refusal(HttpResponse(status=200, headers={"content-type": "application/json"}, body=body))

    assert (503, "metadata_malformed") == (error.status, error.reason)


@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 308, 401, 403, 404, 500, 503])
def test_key_05_a_document_with_any_other_status_is_an_outage(status: int) -> None:
    error = refusal(json_response(document(), status, location="https://evil.test/"))

    assert ("metadata_status", {"http_status": status}) == (error.reason, error.facts)


# --- addresses ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("issuer", "url"),
    [
        ("https://idp.test", "https://idp.test/.well-known/oauth-authorization-server"),
        ("https://idp.test/", "https://idp.test/.well-known/oauth-authorization-server"),
        ("https://idp.test/a/b", "https://idp.test/.well-known/oauth-authorization-server/a/b"),
        ("https://idp.test/a/", "https://idp.test/.well-known/oauth-authorization-server/a"),
        ("https://idp.test:8443/a", "https://idp.test:8443/.well-known/oauth-authorization-server/a"),
    ],
)
def test_the_address_of_rfc_8414_stands_before_the_path(issuer: str, url: str) -> None:
    assert url == oauth_metadata_url(issuer)


@pytest.mark.parametrize(
    ("url", "without_switch", "with_switch"),
    [
        ("https://idp.test/keys", True, True),
        ("https://idp.test:8443/keys?a=b", True, True),
        ("https://[2001:db8::1]/keys", True, True),
        ("HTTPS://idp.test/keys", True, True),
        ("http://127.0.0.1:8080/keys", True, True),
        ("http://[::1]/keys", True, True),
        ("http://localhost:8080/keys", True, True),
        ("http://localhost.evil.test/keys", False, True),
        ("http://keycloak:8080/keys", False, True),
        ("http://127.0.0.1.evil.test/keys", False, True),
        ("ldap://idp.test/keys", False, False),
        ("https://", False, False),
        ("", False, False),
    ],
)
def test_key_07_endpoints_that_may_be_called(url: str, without_switch: bool, with_switch: bool) -> None:
    assert (without_switch, with_switch) == (
        is_acceptable_endpoint(url, allow_http=False),
        is_acceptable_endpoint(url, allow_http=True),
    )


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.255.255.254", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("localhost.evil.test", False),
        ("2130706433", False),
        ("0.0.0.0", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert loopback == is_loopback(host)
