"""
What the documentation shows as configuration is loaded, and what it shows as a command exists.

A block is judged by what it is: YAML by its keys, kong.conf by `key = value`, a command by its
first word. Prose, pictures and wire formats are left alone.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import itertools
import json
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from kong_token_exchange import cli
from kong_token_exchange.config import load_config

ROOT = Path(__file__).resolve().parents[2]

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "docker").rglob("*.md")),
]

# What kong.conf may say here; a typing mistake in one of these would be silent in Kong.
KONG_KEYS = re.compile(
    r"plugins|log_level|lua_package_path|pluginserver_names|pluginserver_token_exchange_(socket|query_cmd|start_cmd)"
    r"|(nginx_http_)?lua_socket_read_timeout|lua_ssl_trusted_certificate|nginx_user|database|declarative_config"
    r"|(worker_)?(consistency|state_update_frequency)|nginx_\w+|pg_\w+|vault_env_prefix|role|cluster_\w+"
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        if page.exists():
            text = page.read_text(encoding="utf-8")
            for match in re.finditer(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
                line = text.count("\n", 0, match.start()) + 1
                yield Block(str(page.relative_to(ROOT)), line, match[1], match[2])


def command_lines() -> Iterator[Block]:
    """Lines of unlabelled and shell blocks, and commands inside sentences."""
    for block in blocks():
        if block.language in ("", "sh", "bash", "shell", "console"):
            joined = block.text.replace("\\\n", " ")
            for number, line in enumerate(joined.splitlines(), block.line + 1):
                yield Block(block.page, number, "", line)
    for page in PAGES:
        if page.exists():
            for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
                for match in re.finditer(r"`([a-z][^`]*)`", line):
                    yield Block(str(page.relative_to(ROOT)), number, "", match[1])


def parametrize(found: list[Block]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", found, ids=[block.id for block in found])


ALL = list(blocks())
YAML = [block for block in ALL if block.language in ("yaml", "yml")]
JSON = [block for block in ALL if block.language == "json"]
KONG_CONF = [block for block in ALL if re.search(r"^(plugins|pluginserver_\w+) = ", block.text, re.MULTILINE)]


def plugin_configs(document: Any) -> Iterator[dict[str, Any]]:
    """Every configuration of ours in a document, however deep: Kong's format, or Kubernetes resources."""
    if isinstance(document, list):
        for item in document:
            yield from plugin_configs(item)
    elif isinstance(document, dict):
        if "token-exchange" in (document.get("name"), document.get("plugin")) and "config" in document:
            # The ingress controller puts values from Secrets in, as JSON.
            patched = {patch["path"].strip("/"): ["resolved"] for patch in document.get("configPatches", ())}
            yield {**document["config"], **patched}
        for value in document.values():
            yield from plugin_configs(value)


def resolved(value: Any) -> Any:
    """Replace vault references by a value, as Kong does before the plugin sees them."""
    if isinstance(value, dict):
        return {name: resolved(member) for name, member in value.items()}
    if isinstance(value, list):
        return [resolved(member) for member in value]
    # As long and as mixed as a seal key has to be.
    secret = "resolved from a vault: 4f1c9a7e2b"
    return secret if isinstance(value, str) and value.startswith("{vault://") else value


def documents(text: str) -> list[Any]:
    return [document for document in yaml.safe_load_all(text) if document is not None]


def test_there_is_something_to_look_at() -> None:
    assert len(YAML) >= 3
    assert len(KONG_CONF) >= 2
    assert any(list(plugin_configs(documents(block.text))) for block in YAML)


@parametrize(YAML)
def test_a_yaml_block_is_yaml_and_its_plugin_configurations_load(block: Block) -> None:
    for config in plugin_configs(documents(block.text)):
        load_config(resolved(config))


def test_the_files_that_are_shipped_load() -> None:
    for path in [ROOT / "kong.yml", *sorted((ROOT / "docker" / "k8s").glob("*.yml"))]:
        for config in plugin_configs(documents(path.read_text(encoding="utf-8"))):
            load_config(resolved(config))


@parametrize(JSON)
def test_a_json_block_is_json(block: Block) -> None:
    json.loads(block.text)


@parametrize(KONG_CONF)
def test_a_kong_conf_block_has_known_keys_and_commands_that_exist(block: Block) -> None:
    for line in block.text.splitlines():
        setting = line.partition("#")[0].strip()
        if setting:
            key, equals, value = (part.strip() for part in setting.partition("="))
            assert equals, line
            assert KONG_KEYS.fullmatch(key), key
            if key.endswith("_cmd") and not value.startswith("cat "):
                check_command(value)


def is_command(line: str) -> bool:
    words = line.split()
    return bool(words) and Path(words[0]).name in KNOWN


def check_command(line: str) -> None:
    """
    Fail unless the command exists with these arguments; what it does is not tried.

    Brackets stand for what may be left out; what two spaces set apart is a remark.
    """
    command = re.split(r"\s{2,}", re.sub(r"\[[^\]]*\]", "", line.strip()))[0]
    words = shlex.split(command, comments=True)
    while "=" in words[0] and "/" not in words[0].partition("=")[0]:
        words = words[1:]
    KNOWN[Path(words[0]).name](words[1:])


def check_ours(arguments: list[str]) -> None:
    parser = cli._parser()
    if not arguments:
        return
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    if arguments[0].startswith("-"):
        assert arguments[0] in parser.format_help(), arguments[0]
        return
    assert arguments[0] in commands.choices, f"no command {arguments[0]}"
    text = commands.choices[arguments[0]].format_help()
    for argument in arguments[1:]:
        if argument.startswith("--"):
            assert argument.partition("=")[0] in text, f"{arguments[0]} knows no {argument}"


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, re.MULTILINE))
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals:
            assert f"$({name}" in makefile or f"{name} " in makefile, f"the Makefile reads no {name}"
        else:
            assert name in targets, f"no target {name}"


def check_python(arguments: list[str]) -> None:
    if arguments[:1] == ["-m"] and arguments[1].partition(".")[0] in ("kong_token_exchange", "benchmarks"):
        assert importlib.util.find_spec(arguments[1]) is not None, arguments[1]
    elif arguments and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).exists(), arguments[0]


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    for wanted in arguments[1:]:
        for extra in re.findall(r"\[([^\]]+)\]", wanted):
            assert set(extra.split(",")) <= EXTRAS, extra


def check_docker(arguments: list[str]) -> None:
    for flag, value in itertools.pairwise(arguments):
        if flag == "-f":
            assert (ROOT / value).exists(), value


def check_kubectl(arguments: list[str]) -> None:
    for flag, value in itertools.pairwise(arguments):
        if flag in ("-f", "-k"):
            assert (ROOT / value).exists(), value


EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])

KNOWN = {
    "pip": check_pip,
    "kong-token-exchange": check_ours,
    "make": check_make,
    "python": check_python,
    "python3": check_python,
    "docker": check_docker,
    "kubectl": check_kubectl,
}

COMMANDS = [block for block in command_lines() if is_command(block.text.strip())]


# Blocks that are neither configuration nor commands, by how they begin: pictures, output, messages.
LEFT_ALONE = (
    "Authorization: Bearer <subject token>",
    "1 transformation: client-1's token becomes",
    "fix(claims): reject exp equal to now",
    "caller                Kong",
    "cli -> wiring -> plugin",
    "grant_type=urn:ietf:params:oauth:grant-type:",
    # What the second level needs in Redis; tests/unit/shell/test_redis_store.py logs in with it.
    "user token-exchange on ",
    "access failed: KeyError at ",
)

PYTHON = [block for block in ALL if block.language == "python"]
OTHERS = [block for block in ALL if block not in [*YAML, *JSON, *KONG_CONF, *PYTHON]]


@parametrize(OTHERS)
def test_a_block_is_loaded_or_run_or_left_alone_on_purpose(block: Block) -> None:
    lines = [line.strip() for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]

    if not lines[0].startswith(LEFT_ALONE):
        strange = [line for line in lines if not (is_command(line) or line.startswith("#"))]
        assert [] == strange, "neither a command that is known here nor listed in LEFT_ALONE"


@parametrize(PYTHON)
def test_a_python_block_compiles_and_its_imports_exist(block: Block) -> None:
    tree = ast.parse(textwrap.dedent(block.text))

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@parametrize(COMMANDS)
def test_a_command_exists(block: Block) -> None:
    check_command(block.text.strip())


def test_a_command_that_does_not_exist_is_found() -> None:
    for line in ("make nothing", "kong-token-exchange fly", "docker compose -f docker/none.yml up"):
        with pytest.raises(AssertionError):
            check_command(line)
