"""The configuration's definition against Kong's plugin, Kong's metaschema and the files made from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kong_token_exchange import schema
from kong_token_exchange.schema import CONFIG, NOT_YET, Field
from tests.unit.test_cache_pairs import unplaced_fields

ROOT = Path(__file__).parents[2]
KONG_FIELDS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("kong_openid_connect_3_16.json").read_text(encoding="utf-8")
)["fields"]

DELIBERATE_DIFFERENCES: dict[tuple[str, str], tuple[object, object]] = {
    ("issuer", "required"): (None, True),
    ("client_id", "required"): (None, True),
    ("token_exchange", "required"): (None, True),
    ("upstream_access_token_header", "required"): (None, True),
    ("auth_methods", "default"): (KONG_FIELDS["auth_methods"]["default"], ["bearer"]),
    ("bearer_token_param_type", "default"): (["body", "header", "query"], ["header"]),
    ("token_exchange.subject_token_issuers[].verify_signature", "default"): (False, True),
    ("cluster_cache_redis.connect_timeout", "default"): (2000, 50),
    ("cluster_cache_redis.read_timeout", "default"): (2000, 50),
    ("cluster_cache_redis.send_timeout", "default"): (2000, 50),
    ("protected_resource_metadata.resource", "required"): (True, None),
    ("protected_resource_metadata.authorization_servers", "required"): (True, None),
    ("proof_of_possession_mtls_from_header.ca_certificates", "required"): (True, None),
    ("proof_of_possession_mtls_from_header.certificate_header_name", "required"): (True, None),
    ("proof_of_possession_mtls_from_header.revocation_check_mode", "default"): ("IGNORE_CA_ERROR", "SKIP"),
}
OURS_ALONE = {
    "between": (
        "leeway",
        "timeout",
        "cache_ttl",
        "cache_ttl_max",
        "cache_ttl_neg",
        "token_exchange.cache.ttl",
        "dpop_proof_lifetime",
    )
}


def walk(path: str, field: Field) -> Iterator[tuple[str, Field]]:
    yield path, field
    for name, child in field.fields.items():
        yield from walk(f"{path}.{name}" if path else name, child)
    if field.elements is not None:
        yield from walk(f"{path}[]", field.elements)


def walk_kong(field: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, field
    for entry in field.get("fields", []):
        ((name, child),) = entry.items()
        yield from walk_kong(child, f"{path}.{name}")
    for nested in ("elements", "keys", "values"):
        if nested in field:
            yield from walk_kong(field[nested], f"{path}.<{nested}>")


OUR_FIELDS = dict(walk("", CONFIG))
KONG_RENDERED = list(walk_kong(schema.kong_field(CONFIG), "config"))


# --- against Kong's openid-connect ----------------------------------------------------


def test_the_reference_has_the_token_exchange_block_whole() -> None:
    names = {
        path.partition(".")[2].partition(".")[0] for path in KONG_FIELDS if path.startswith("token_exchange.")
    }

    assert {"cache", "grant_type", "map_identities_from", "provider", "request"} <= names
    assert len(KONG_FIELDS) > 200


@pytest.mark.parametrize("path", KONG_FIELDS)
def test_field_is_kongs_but_for_the_listed_differences(path: str) -> None:
    field, kong = OUR_FIELDS[path], KONG_FIELDS[path]
    rendered = schema.kong_field(field)

    for attribute in ("type", "default", "one_of", "referenceable", "encrypted", "between", "required"):
        theirs, ours = kong.get(attribute), rendered.get(attribute)
        if attribute == "one_of":
            theirs, ours = sorted(theirs or []), sorted(ours or [])
        if path in OURS_ALONE.get(attribute, ()):
            continue
        expected = DELIBERATE_DIFFERENCES.get((path, attribute))
        assert (theirs, ours) == expected if expected else theirs == ours, attribute


@pytest.mark.parametrize(
    "path",
    sorted({path for path, _ in DELIBERATE_DIFFERENCES} - {"issuer", "client_id"}),
)
def test_a_difference_in_behaviour_is_told_beside_the_field(path: str) -> None:
    assert OUR_FIELDS[path].difference


# --- against Kong's metaschema --------------------------------------------------------

# kong/db/schema/metaschema.lua at 3.9.1, the part that JSON can carry and that we use.
ATTRIBUTES = {
    "type", "description", "required", "default", "one_of", "between", "len_min", "elements", "fields",
    "keys", "values", "referenceable", "encrypted",
}  # fmt: skip
ONLY_FOR = {
    "one_of": {"string"},
    "between": {"integer", "number"},
    "len_min": {"array", "string", "map"},
    "elements": {"array"},
    "fields": {"record"},
    "keys": {"map"},
    "values": {"map"},
}
NEEDED = {"array": {"elements"}, "map": {"keys", "values"}, "record": {"fields"}}
PYTHON_TYPES = {"string": str, "boolean": bool, "integer": int, "number": int, "array": list}


@pytest.mark.parametrize(("path", "field"), KONG_RENDERED, ids=[path for path, _ in KONG_RENDERED])
def test_kongs_metaschema_accepts_the_field(path: str, field: dict[str, Any]) -> None:
    kind = field["type"]

    assert field.keys() <= ATTRIBUTES
    assert NEEDED.get(kind, set()) <= field.keys()
    assert [name for name in field if kind not in ONLY_FOR.get(name, {kind})] == []
    assert 10 <= len(field.get("description", "long enough")) <= 500
    if "default" in field:
        assert type(field["default"]) is PYTHON_TYPES[kind]
        assert field["default"] in field.get("one_of", [field["default"]])


@pytest.mark.parametrize("path", [path for path in OUR_FIELDS if path and not path.endswith("[]")])
def test_every_named_field_is_described(path: str) -> None:
    assert OUR_FIELDS[path].description


def test_gw_17_the_plugin_schema_is_json_and_refuses_consumers() -> None:
    dumped = json.loads(json.dumps(schema.plugin_schema()))
    fields = {name: field for entry in dumped["fields"] for name, field in entry.items()}

    assert dumped["name"] == "token-exchange"
    assert [next(iter(entry)) for entry in dumped["fields"]] == ["consumer", "protocols", "config"]
    assert fields["consumer"]["eq"] is None
    assert {"http", "https", "grpc", "grpcs"} == set(fields["protocols"]["default"])
    assert fields["config"]["required"] is True


def test_rules_between_fields_name_fields_that_exist() -> None:
    named = set()
    for check in schema.plugin_schema()["entity_checks"]:  # type: ignore[union-attr]
        ((kind, argument),) = check.items()  # type: ignore[union-attr]
        if kind == "conditional":
            named |= {argument["if_field"], argument["then_field"]}  # type: ignore[index,call-overload]
        else:
            named |= set(argument)  # type: ignore[arg-type]

    assert "config.token_exchange.provider" in named
    assert named <= {f"config.{path}" for path in OUR_FIELDS}


# --- the files made from it -----------------------------------------------------------


def test_schema_json_is_in_step() -> None:
    assert schema.json_schema_text() == (ROOT / "schema.json").read_text(encoding="utf-8"), (
        "run: python -m kong_token_exchange.schema schema.json docs/configuration.md"
    )


def test_the_reference_page_is_in_step() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

    assert schema.insert_reference(page) == page, (
        "run: python -m kong_token_exchange.schema schema.json docs/configuration.md"
    )


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="marks"):
        schema.insert_reference("# nothing here\n")


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    schema_path, page_path = tmp_path / "schema.json", tmp_path / "page.md"
    page_path.write_text(f"before\n{schema.BEGIN_MARK}\nold\n{schema.END_MARK}\nafter\n", encoding="utf-8")

    schema.write_files(schema_path, page_path)
    first = (schema_path.read_bytes(), page_path.read_bytes())
    schema.write_files(schema_path, page_path)

    assert first == (schema_path.read_bytes(), page_path.read_bytes())
    assert first[1].startswith(b"before\n")
    assert first[1].endswith(b"after\n")
    assert b"\nold\n" not in first[1]


def test_every_top_level_field_is_in_the_reference() -> None:
    page = schema.reference_markdown()

    assert [name for name in CONFIG.fields if name != "token_exchange" and f"| `{name}` |" not in page] == []


# --- JSON Schema ----------------------------------------------------------------------


def find(*path: str) -> dict[str, Any]:
    node: Any = schema.json_schema()
    for name in path:
        node = node["items"] if name == "[]" else node["properties"][name]
    assert isinstance(node, dict)
    return node


def test_json_schema_says_its_dialect_and_refuses_unknown_fields() -> None:
    top = schema.json_schema()

    assert top["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert top["additionalProperties"] is False
    assert {"issuer", "client_id", "token_exchange"} == set(top["required"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("issuer",), {"type": "string", "minLength": 1}),
        (("token_endpoint",), {"type": ["string", "null"], "minLength": 1}),
        (("leeway",), {"type": ["number", "null"], "minimum": 0, "maximum": 3600}),
        (("http_proxy",), {"enum": [None]}),
        (("keepalive",), {"enum": [True, None]}),
        (("verify_signature",), {"enum": [True, None]}),
        (("issuers_allowed",), {"type": ["array", "null"], "maxItems": 0}),
        (("credential_claim",), {"items": {"enum": ["sub"]}, "maxItems": 1}),
        (("client_auth", "[]"), {"enum": ["client_secret_basic", "client_secret_post", "none"]}),
        (("bearer_token_param_type", "[]"), {"enum": ["cookie", "header", "query"]}),
        (("token_exchange", "subject_token_issuers"), {"type": "array", "minItems": 1}),
        (("token_exchange", "subject_token_issuers", "[]"), {"required": ["issuer"]}),
        (("token_exchange", "grant_type"), {"enum": ["jwt_bearer", "token_exchange", None]}),
        (
            ("token_exchange", "request", "actor_token", "source"),
            {"type": ["string", "null"], "enum": ["config", "header", "none", None]},
        ),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_json_schema_of_a_field(path: tuple[str, ...], expected: dict[str, Any]) -> None:
    node = find(*path)

    assert expected == {name: node.get(name) for name in expected}


def test_what_is_not_supported_yet_is_marked_all_the_way_down() -> None:
    for name, field in CONFIG.fields.items():
        if field.only_default == NOT_YET:
            assert [
                path for path, inner in walk(name, field) if not path.endswith("[]") and "[]." not in path
                and inner.only_default != NOT_YET
            ] == []  # fmt: skip


# --- caching --------------------------------------------------------------------------


def test_cache_01_every_field_has_a_row_in_the_table_of_pairs() -> None:
    assert set() == unplaced_fields(), "place it in FIELDS of tests/unit/test_cache_pairs.py"
