"""docs/dependencies.md: the versions that are pinned, under licences that may be shipped."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# May be shipped beside Apache-2.0 without more than a notice.
PERMISSIVE = {
    "Apache Software License",
    "Apache-2.0",
    "BSD License",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "MIT",
    "MIT License",
    "MIT-0",
    "Mozilla Public License 2.0 (MPL 2.0)",
    "PSF-2.0",
    "Python Software Foundation License",
    "ZPL-2.1",
}

ROWS = re.findall(
    r"^\| ([\w.-]+) \| (\d[\w.]*) \| (.+) \|$",
    (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return {
        normal(name): version for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE)
    }


def load_inventory() -> Any:
    spec = importlib.util.spec_from_file_location("inventory", ROOT / "docker" / "inventory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_is_what_is_installed() -> None:
    inventory = load_inventory()

    assert {name for name, _, _ in ROWS} == {
        one.name for one in inventory.installed(inventory.ROOT).values() if one.name != inventory.ROOT
    }


@pytest.mark.parametrize(("name", "version"), [row[:2] for row in ROWS])
def test_each_version_is_the_pinned_one(name: str, version: str) -> None:
    assert pins()[normal(name)] == version


@pytest.mark.parametrize(("name", "licence"), [(row[0], row[2]) for row in ROWS])
def test_each_licence_is_permissive(name: str, licence: str) -> None:
    # Of a choice one is enough, of a sum all are needed.
    choices = [set(choice.split(" AND ")) for choice in licence.split(" OR ")]

    assert any(choice <= PERMISSIVE for choice in choices), licence


def test_the_bill_of_materials_has_the_same_members() -> None:
    inventory = load_inventory()
    found = sorted(inventory.installed(inventory.ROOT).values(), key=lambda one: one.name)

    text = inventory.cyclonedx(found)

    for name, version, _ in ROWS:
        assert f"pkg:pypi/{normal(name)}@{version}" in text
    # Same environment, same bytes: nothing of the moment is in it.
    assert text == inventory.cyclonedx(found)
    assert "timestamp" not in text
    assert "serialNumber" not in text
