"""
List what is installed beside the plugin: a table of licences, or a CycloneDX bill of materials.

    python docker/inventory.py --format markdown    # docs/dependencies.md
    python docker/inventory.py --format cyclonedx   # the images' sbom.cdx.json

Only the distribution, what it needs, with the extras for running as far as they are installed, and
what that needs are listed, whatever else is there.

Source: CycloneDX 1.6; Core metadata specifications (Python packaging), License-Expression.
"""

# ruff: noqa: INP001, T201 - a script in an image, beside no package
from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

ROOT = "kong-token-exchange"

# What may be installed for running; the images have it.
EXTRAS = frozenset({"redis"})

# Requirements that are for an extra are not installed by default.
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?")

INTRODUCTION = """# Dependencies

What is installed with the plugin, and under which licence.
`redis` comes with the extra of that name, and is in the images.
The reason for each direct one is in [ADR 1](adr/0001-dependencies.md).
Written by `python docker/inventory.py --format markdown`.
The images carry the same list as CycloneDX in `/opt/token-exchange/sbom.cdx.json`.

"""


def main() -> int:
    """Print the list."""
    parser = argparse.ArgumentParser(description="List the plugin's dependencies.")
    parser.add_argument("--format", choices=["markdown", "cyclonedx"], default="markdown")
    options = parser.parse_args()
    found = sorted(installed(ROOT).values(), key=lambda one: normal_name(one.name))
    print(markdown(found) if options.format == "markdown" else cyclonedx(found), end="")
    return 0


def normal_name(name: str) -> str:
    """Return *name* as registries compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(root: str) -> dict[str, Distribution]:
    """Return *root* and everything that is installed of what it needs, by normal name."""
    found: dict[str, Distribution] = {}
    waiting = [(root, EXTRAS)]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            one = distribution(name)
        except PackageNotFoundError:
            # For another platform, another version of Python, or an extra that is not installed.
            continue
        found[normal_name(name)] = one
        for need in requirements(one, extras):
            if need not in seen:
                seen.add(need)
                waiting.append(need)
    return found


def requirements(one: Distribution, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield what a distribution needs with these extras: name and extras of each."""
    for line in one.requires or ():
        requirement, _, marker = line.partition(";")
        wanted = re.search(r"""extra\s*==\s*["']([^"']+)["']""", marker)
        if wanted and normal_name(wanted[1]) not in extras:
            continue
        match = _REQUIREMENT.match(requirement)
        if match:
            named = frozenset(normal_name(part) for part in (match[2] or "").split(",") if part.strip())
            yield normal_name(match[1]), named


def licence(one: Distribution) -> str:
    """Return the licence as the distribution states it, in the newest way it knows."""
    expression = one.metadata.get("License-Expression")
    if expression:
        return str(expression)
    classified = [
        value.rpartition(" :: ")[2]
        for value in one.metadata.get_all("Classifier") or ()
        if value.startswith("License :: ") and value != "License :: OSI Approved"
    ]
    # Old metadata may hold the whole text; its first line names it.
    stated = (one.metadata.get("License") or "").strip().partition("\n")[0]
    return " AND ".join(classified) or stated or "not stated"


def markdown(found: list[Distribution]) -> str:
    """Return docs/dependencies.md."""
    rows = "".join(f"| {one.name} | {one.version} | {licence(one)} |\n" for one in found if one.name != ROOT)
    return f"{INTRODUCTION}| package | version | licence |\n|---|---|---|\n{rows}"


def cyclonedx(found: list[Distribution]) -> str:
    """Return a CycloneDX document without serial number and time: same environment, same bytes."""

    def component(one: Distribution, kind: str) -> dict[str, object]:
        purl = f"pkg:pypi/{normal_name(one.name)}@{one.version}"
        return {
            "type": kind,
            "bom-ref": purl,
            "name": one.name,
            "version": one.version,
            "licenses": [{"license": {"name": licence(one)}}],
            "purl": purl,
        }

    root = next(one for one in found if normal_name(one.name) == ROOT)
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        # No serial number and no time: the same environment gives the same bytes.
        "metadata": {"component": component(root, "application")},
        "components": [component(one, "library") for one in found if one is not root],
    }
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.exit(main())
