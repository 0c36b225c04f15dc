"""JSON as a security boundary reads it; the published suite runs in tests/unit/test_vectors.py."""

import pytest

from kong_token_exchange.core.strict_json import MAX_DEPTH, Json, JsonError, parse_json, parse_json_object

MAX = 8192


def short(value: object) -> str:
    return ascii(value)[:40]


def read(text: str | bytes) -> Json:
    return parse_json(text.encode() if isinstance(text, str) else text, max_bytes=MAX)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("true", True),
        ("0", 0),
        ("-0", 0),
        ("-1.5e3", -1500.0),
        ('""', ""),
        ('"\\u00e9é"', "éé"),
        ('"\\ud83d\\ude00"', "😀"),
        ('"\\u0000"', "\0"),
        (" \t\r\n[1 , 2]\n", [1, 2]),
        ('{"a":{"a":1},"b":{"a":2}}', {"a": {"a": 1}, "b": {"a": 2}}),
        ('{"":1}', {"": 1}),
        ("1e-400", 0.0),
        ("9" * 4300, int("9" * 4300)),
    ],
    ids=short,
)
def test_strict_json_is_read(text: str, value: Json) -> None:
    assert read(text) == value
    assert type(read(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "constant"),
        ("[Infinity]", "constant"),
        ('{"a":-Infinity}', "constant"),
        ("1e400", "overflow"),
        ("[-1e400]", "overflow"),
        ("1" * 400 + ".5", "overflow"),
        ('{"a":1,"a":1}', "duplicate_member"),
        ('{"a":1,"b":2,"a":3}', "duplicate_member"),
        ('{"a":1,"\\u0061":1}', "duplicate_member"),
        ('[{"x":{"":1,"":2}}]', "duplicate_member"),
        ('"\\ud800"', "lone_surrogate"),
        ('["\\udfff"]', "lone_surrogate"),
        ('{"\\ud800":1}', "lone_surrogate"),
        ('{"a":["\\ude00\\ud83d"]}', "lone_surrogate"),
        (b'"\xed\xa0\x80"', "malformed"),
        (b'"\xff"', "malformed"),
        (b'"\xc0\xaf"', "malformed"),
        (b"\xef\xbb\xbf{}", "malformed"),
        (b"\xff\xfe{\x00}\x00", "malformed"),
        ("{}\0", "malformed"),
        ("{} {}", "malformed"),
        ("[1,]", "malformed"),
        ("{'a':1}", "malformed"),
        ("01", "malformed"),
        ("+1", "malformed"),
        (".5", "malformed"),
        ("1.", "malformed"),
        ("0x10", "malformed"),
        ("1_000", "malformed"),
        ("\u0661", "malformed"),
        ("True", "malformed"),
        ('"a\nb"', "malformed"),
        ('"\\x41"', "malformed"),
        ("\u00a0{}", "malformed"),
        ("\x0c{}", "malformed"),
        ("// no\n{}", "malformed"),
        ("", "malformed"),
        ("9" * 4301 + "", "too_long"),
        ("[" * 4000, "malformed"),
        ("[" * 33 + "]" * 33, "too_deep"),
        ('{"a":' * 33 + "1" + "}" * 33, "too_deep"),
    ],
    ids=short,
)
def test_anything_else_is_refused(text: str | bytes, reason: str) -> None:
    data = text.encode() if isinstance(text, str) else text
    limit = 4300 if reason == "too_long" else max(MAX, len(data))
    with pytest.raises(JsonError) as caught:
        parse_json(data, max_bytes=limit)
    assert str(caught.value) == reason


def test_number_beyond_pythons_own_limit_is_malformed_and_no_crash() -> None:
    with pytest.raises(JsonError) as caught:
        parse_json(b"9" * 5000, max_bytes=10_000)
    assert str(caught.value) == "malformed"


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_depth_counts_arrays_and_objects(depth: int, opening: str, closing: str) -> None:
    levels = len(closing)
    text = (
        opening * (depth // levels)
        + "[" * (depth % levels)
        + "1"
        + "]" * (depth % levels)
        + closing * (depth // levels)
    )
    if depth <= MAX_DEPTH:
        read(text)
    else:
        with pytest.raises(JsonError, match="too_deep"):
            read(text)


@pytest.mark.parametrize("inner", [MAX_DEPTH - 2, MAX_DEPTH - 1, MAX_DEPTH])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("beside", ["[]," * 40 + "%s", "%s" + ",{}" * 40], ids=["after", "before"])
def test_depth_is_that_of_the_deepest_place(inner: int, opening: str, closing: str, beside: str) -> None:
    text = f"[{beside % (opening * inner + '1' + closing * inner)}]"
    if inner < MAX_DEPTH:
        read(text)
    else:
        with pytest.raises(JsonError, match="too_deep"):
            read(text)


def test_depth_is_the_one_that_was_decided() -> None:
    assert MAX_DEPTH == 32


def test_brackets_within_text_and_beside_each_other_are_no_depth() -> None:
    assert read('["' + "[{" * 200 + '"]') == ["[{" * 200]
    assert read("[" + ",".join(["[]", "{}"] * 100) + "]") == [[], {}] * 100


@pytest.mark.parametrize("size", [9, 10, 11])
def test_size_is_bounded(size: int) -> None:
    data = b"1".ljust(size)
    if size <= 10:
        assert parse_json(data, max_bytes=10) == 1
    else:
        with pytest.raises(JsonError, match="too_long"):
            parse_json(data, max_bytes=10)


@pytest.mark.parametrize("text", [b"[]", b"1", b"null", b'"{}"', b"true"])
def test_object_is_required_where_one_is_asked_for(text: bytes) -> None:
    with pytest.raises(JsonError, match="not_an_object"):
        parse_json_object(text, max_bytes=MAX)
    assert parse_json_object(b"{}", max_bytes=MAX) == {}


def test_reason_holds_nothing_of_the_input() -> None:
    for text in (b'{"MARK":1,"MARK":2}', b'{"MARK":', b'"MARK\\ud800"', b"MARK", b'{"MARK":NaN}'):
        with pytest.raises(JsonError) as caught:
            parse_json(text, max_bytes=MAX)
        assert "MARK" not in repr(caught.value)
        assert caught.value.__cause__ is None
