"""
What Kong does to a plugin's configuration before the plugin sees it.

Given the schema from the query command, fill in defaults, refuse what the schema
refuses, resolve vault references and leave unset fields out, so that a plugin
gets in the sandbox what Kong would send it.

Checked: unknown and missing fields, types, `one_of`, `between`, `gt`, `len_min`
and `len_max`. Not evaluated: `match` and its kin, `entity_checks`.

Source: Kong 3.9.1 `kong/db/schema/init.lua` (behaviour).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Fields = Sequence[Mapping[str, Mapping[str, Any]]]

_REFERENCE = re.compile(r"\{vault://env/([A-Za-z0-9_-]+)(?:/([^}?]+))?\}\Z")

_ABSENT = object()

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list, tuple),
    "set": (list, tuple),
    "map": (Mapping,),
    "record": (Mapping,),
}


class SchemaError(ValueError):
    """A configuration that Kong would refuse; the text begins with the path in it."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")


def config_fields(schema: Mapping[str, Any]) -> Fields:
    """Return the fields of `config` in a plugin's schema."""
    for field in schema.get("fields", ()):
        if "config" in field:
            fields: Fields = field["config"]["fields"]
            return fields
    raise SchemaError("schema", "has no config record")


def complete(
    fields: Fields, given: Mapping[str, Any] | None, environ: Mapping[str, str], path: str = "config"
) -> Any:
    """
    Return *given* as Kong hands it to the plugin.

    Args:
        fields: The record's fields, from the schema.
        given: What the operator wrote.
        environ: Where `{vault://env/...}` references look.
        path: For messages.

    Returns:
        A dict with defaults filled in, unset fields left out, references resolved
        and `$refs` naming the fields they came from.

    Raises:
        SchemaError: the first thing that the schema refuses.
    """
    given = given or {}
    specs = {name: spec for field in fields for name, spec in field.items()}
    for name in given:
        if name not in specs:
            raise SchemaError(f"{path}.{name}", "unknown field")
    result: dict[str, Any] = {}
    references: dict[str, Any] = {}
    for name, spec in specs.items():
        value = _complete_value(spec, given.get(name, _ABSENT), environ, f"{path}.{name}")
        if value is None:
            continue
        result[name], reference = _resolve(spec, value, environ)
        if reference is not None:
            references[name] = reference
    if references:
        result["$refs"] = references
    return result


def _complete_value(spec: Mapping[str, Any], value: Any, environ: Mapping[str, str], path: str) -> Any:
    """Return the value with defaults, or None for an unset field."""
    required = spec.get("required") is True
    # An explicit null keeps an optional field unset; a required one gets its default back.
    if value is None and not required:
        return None
    if value is None or value is _ABSENT:
        if "default" in spec:
            value = spec["default"]
        elif required and spec["type"] == "record":
            value = {}
        elif required:
            raise SchemaError(path, "required field missing")
        else:
            return None
    _check(spec, value, path)
    return _descend(spec, value, environ, path)


def _descend(spec: Mapping[str, Any], value: Any, environ: Mapping[str, str], path: str) -> Any:
    kind = spec["type"]
    if kind == "record":
        return complete(spec["fields"], value, environ, path)
    if kind in ("array", "set"):
        items = [
            _complete_value(spec["elements"], item, environ, f"{path}[{number}]")
            for number, item in enumerate(value, start=1)
        ]
        return items if kind == "array" else [item for at, item in enumerate(items) if item not in items[:at]]
    if kind == "map":
        return {
            key: _complete_value(spec["values"], item, environ, f"{path}.{key}")
            for key, item in value.items()
        }
    return value


def _check(spec: Mapping[str, Any], value: Any, path: str) -> None:
    kind = spec["type"]
    expected = _TYPES.get(kind)
    if expected is None:
        return
    if not isinstance(value, expected) or (isinstance(value, bool) and kind != "boolean"):
        raise SchemaError(path, f"expected {'an' if kind[0] in 'ai' else 'a'} {kind}")
    if "one_of" in spec and value not in spec["one_of"]:
        raise SchemaError(path, f"expected one of: {', '.join(map(str, spec['one_of']))}")
    if "between" in spec and not spec["between"][0] <= value <= spec["between"][1]:
        raise SchemaError(path, f"value should be between {spec['between'][0]} and {spec['between'][1]}")
    if "gt" in spec and not value > spec["gt"]:
        raise SchemaError(path, f"value must be greater than {spec['gt']}")
    _check_length(spec, value, path)


def _check_length(spec: Mapping[str, Any], value: Any, path: str) -> None:
    # An empty string is refused unless the schema says otherwise.
    least = spec.get("len_min", 1 if spec["type"] == "string" else 0)
    if least and hasattr(value, "__len__") and len(value) < least:
        raise SchemaError(path, f"length must be at least {least}")
    most = spec.get("len_max")
    if most is not None and hasattr(value, "__len__") and len(value) > most:
        raise SchemaError(path, f"length must be at most {most}")


# --- vault references -----------------------------------------------------------------


def _resolve(spec: Mapping[str, Any], value: Any, environ: Mapping[str, str]) -> tuple[Any, Any]:
    """Return (value, reference); the reference is None where there was none."""
    if spec["type"] == "string" and spec.get("referenceable") and _is_reference(value):
        return _look_up(value, environ), value
    elements = spec.get("elements", {})
    of_texts = spec["type"] in ("array", "set") and elements.get("type") == "string"
    if of_texts and elements.get("referenceable") and any(map(_is_reference, value)):
        resolved = [_look_up(item, environ) if _is_reference(item) else item for item in value]
        return resolved, [item if _is_reference(item) else None for item in value]
    return value, None


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("{vault://") and value.endswith("}")


def _look_up(reference: str, environ: Mapping[str, str]) -> str:
    """Resolve a reference to the env vault; like Kong, give "" for one that leads nowhere."""
    match = _REFERENCE.match(reference)
    if match is None:
        return ""
    text = environ.get(match[1].upper().replace("-", "_"), "")
    if match[2] is None:
        return text
    try:
        return str(json.loads(text)[match[2]])
    except (ValueError, KeyError, TypeError):
        return ""
