import pytest

from kong_token_exchange.sandbox import kong_schema
from kong_token_exchange.sandbox.kong_schema import SchemaError, complete

TEXT = {"type": "string"}

FIELDS = [
    {"plain": TEXT},
    {"number": {"type": "number", "default": 5}},
    {"needed": {"type": "string", "required": True, "default": "x"}},
    {"choice": {"type": "string", "one_of": ["a", "b"]}},
    {"port": {"type": "integer", "between": [1, 9]}},
    {"many": {"type": "array", "elements": {"type": "string", "referenceable": True}, "len_min": 1}},
    {"once": {"type": "set", "elements": TEXT}},
    {"named": {"type": "map", "values": {"type": "integer"}}},
    {"secret": {"type": "string", "referenceable": True, "len_min": 0}},
    {"may": {"type": "record", "fields": [{"a": {"type": "boolean", "default": True}}, {"b": TEXT}]}},
    {"must": {"type": "record", "required": True, "fields": [{"a": {"type": "boolean", "default": False}}]}},
    {
        "items": {
            "type": "array",
            "elements": {"type": "record", "fields": [{"a": {**TEXT, "required": True}}]},
        }
    },
    {"positive": {"type": "number", "gt": 0}},
    {"short": {"type": "string", "len_max": 3}},
]

DEFAULTS = {"number": 5, "needed": "x", "must": {"a": False}}


def test_defaults_are_filled_in_and_unset_fields_are_left_out():
    assert complete(FIELDS, {}, {}) == DEFAULTS
    assert complete(FIELDS, None, {}) == DEFAULTS


def test_given_values_stay_and_records_are_completed_inside():
    given = {"plain": "p", "may": {}, "must": {"a": True}, "items": [{"a": "1"}], "named": {"k": 1}}

    assert complete(FIELDS, given, {}) == {**DEFAULTS, **given, "may": {"a": True}, "must": {"a": True}}


def test_explicit_null_unsets_an_optional_field_and_restores_a_required_one():
    assert complete(FIELDS, {"number": None, "needed": None, "must": None, "may": None}, {}) == {
        "needed": "x",
        "must": {"a": False},
    }


def test_defaults_are_not_shared_between_configurations():
    fields = [{"list": {"type": "array", "elements": TEXT, "default": ["a"]}}]
    complete(fields, {}, {})["list"].append("b")

    assert complete(fields, {}, {}) == {"list": ["a"]}


def test_set_drops_repetitions_in_order():
    assert complete(FIELDS, {"once": ["b", "a", "b"]}, {})["once"] == ["b", "a"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"typo": 1}, "config.typo: unknown field"),
        ({"may": {"typo": 1}}, "config.may.typo: unknown field"),
        ({"items": [{"a": "1"}, {}]}, "config.items[2].a: required field missing"),
        ({"plain": 1}, "config.plain: expected a string"),
        ({"plain": ""}, "config.plain: length must be at least 1"),
        ({"number": "5"}, "config.number: expected a number"),
        ({"number": True}, "config.number: expected a number"),
        ({"port": 1.5}, "config.port: expected an integer"),
        ({"port": 0}, "config.port: value should be between 1 and 9"),
        ({"choice": "c"}, "config.choice: expected one of: a, b"),
        ({"many": []}, "config.many: length must be at least 1"),
        ({"many": "a"}, "config.many: expected an array"),
        ({"many": [1]}, "config.many[1]: expected a string"),
        ({"may": [1]}, "config.may: expected a record"),
        ({"named": {"k": "1"}}, "config.named.k: expected an integer"),
        ({"positive": 0}, "config.positive: value must be greater than 0"),
        ({"short": "abcd"}, "config.short: length must be at most 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_schema_refuses_is_refused_with_its_path(given, message):
    with pytest.raises(SchemaError) as caught:
        complete(FIELDS, given, {})

    assert str(caught.value) == message


def test_missing_required_field_without_a_default_is_refused():
    with pytest.raises(SchemaError, match=r"config\.a: required field missing"):
        complete([{"a": {**TEXT, "required": True}}], {}, {})


ENVIRON = {"CLIENT_2_SECRET": "s3cret", "BUNDLE": '{"user": "u", "n": 1}'}


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("{vault://env/client-2-secret}", "s3cret"),
        ("{vault://env/bundle/user}", "u"),
        ("{vault://env/bundle/none}", ""),
        ("{vault://env/absent}", ""),
        ("{vault://aws/client-2-secret}", ""),
    ],
)
def test_vault_reference_is_resolved_and_named_in_refs(reference, value):
    done = complete(FIELDS, {"secret": reference, "many": ["plain", reference]}, ENVIRON)

    assert (done["secret"], done["many"]) == (value, ["plain", value])
    assert done["$refs"] == {"secret": reference, "many": [None, reference]}


def test_text_that_only_looks_like_a_reference_stays_where_references_are_not_allowed():
    done = complete(FIELDS, {"plain": "{vault://env/client-2-secret}", "secret": "plain"}, ENVIRON)

    assert (done["plain"], done["secret"]) == ("{vault://env/client-2-secret}", "plain")
    assert "$refs" not in done


def test_config_record_is_found_in_a_plugin_schema():
    schema = {"fields": [{"protocols": {}}, {"config": {"type": "record", "fields": FIELDS}}]}

    assert kong_schema.config_fields(schema) is FIELDS
    with pytest.raises(SchemaError):
        kong_schema.config_fields({"fields": []})
