"""
What is published, built and installed as a stranger would: a clean copy, an empty environment.

Needs the package registry, or a folder of wheels that pip knows of; skipped where neither is.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.gateways import ROOT, wait_until

pytestmark = pytest.mark.integration

# Fetching a dozen wheels on a slow line.
INSTALL_TIMEOUT_S = 600.0

# What a build reads; the rest of the tree must not be needed.
SOURCES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "constraints.txt",
    "kong.yml",
    "schema.json",
)
FOLDERS = ("kong_token_exchange", "tests", "docs", "docker")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command without this process's Python environment and return what it printed."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, check=False, cwd=cwd, env=clean, timeout=INSTALL_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode != 0:
        told = done.stdout + done.stderr
        if "No matching distribution found" in told or "Connection" in told:
            pytest.skip("packages cannot be fetched here")
        raise AssertionError(f"{command}: {told[-4000:]}")
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without anything that is built, cached or ignored."""
    target = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    for name in FOLDERS:
        if (ROOT / name).exists():
            shutil.copytree(
                ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
    return target


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=True)
    return folder


@pytest.fixture(scope="module")
def builder(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the build backend that pyproject.toml names."""
    folder = tmp_path_factory.mktemp("build") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", clone / "constraints.txt", "hatchling")
    return python


@pytest.fixture(scope="module")
def built(clone: Path, builder: Path) -> dict[str, Path]:
    """The wheel and the sdist."""
    run(builder, "-m", "hatchling", "build", cwd=clone)
    (wheel,) = (clone / "dist").glob("*.whl")
    (sdist,) = (clone / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], clone: Path, empty_environment: Path) -> Path:
    """The folder of the commands, after the wheel was installed with the pinned versions."""
    programs = empty_environment / "bin"
    run(
        programs / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        clone / "constraints.txt",
        built["wheel"],
    )
    return programs


def test_the_wheel_holds_the_package_alone_and_its_types(built: dict[str, Path]) -> None:
    names = zipfile.ZipFile(built["wheel"]).namelist()

    assert "kong_token_exchange/py.typed" in names
    tops = {name.partition("/")[0] for name in names}
    assert {"kong_token_exchange"} == {top for top in tops if not top.endswith(".dist-info")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_build_can_be_repeated_byte_by_byte(
    built: dict[str, Path], builder: Path, clone: Path, tmp_path: Path
) -> None:
    # Another place, and files of another moment.
    again = tmp_path / "elsewhere"
    shutil.copytree(clone, again, ignore=shutil.ignore_patterns("dist"), copy_function=shutil.copy)

    run(builder, "-m", "hatchling", "build", cwd=again)

    for archive in built.values():
        assert archive.read_bytes() == (again / "dist" / archive.name).read_bytes()


def test_the_sdist_can_be_built_again(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = archive.getnames()
    inside = {name.partition("/")[2] for name in names}

    wanted = {"pyproject.toml", "README.md", "LICENSE", "kong.yml", "schema.json"}
    assert wanted <= inside
    assert any(name.startswith("tests/") for name in inside)


def test_every_dependency_is_installable_with_the_pins(installed: Path) -> None:
    assert "No broken requirements found." in run(installed / "python", "-m", "pip", "check")


def test_the_command_describes_the_plugin(installed: Path) -> None:
    description = json.loads(run(installed / "kong-token-exchange", "describe"))

    assert "ProtoBuf:1" == description["Protocol"]
    (plugin,) = description["Plugins"]
    assert ("token-exchange", 1050, ["access"]) == (plugin["Name"], plugin["Priority"], plugin["Phases"])
    version = run(installed / "kong-token-exchange", "--version").strip()
    assert version == plugin["Version"]


@pytest.fixture
def server(installed: Path, tmp_path: Path) -> Iterator[Path]:
    with serving(installed, tmp_path) as path:
        yield path


@contextmanager
def serving(programs: Path, folder: Path) -> Iterator[Path]:
    """Serve on a socket in *folder* and yield its path; it must end in order."""
    # The path of a unix socket is short.
    process = subprocess.Popen(
        [str(programs / "kong-token-exchange"), "serve", "--socket", "te.socket"], cwd=folder,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert wait_until((folder / "te.socket").exists)
        yield folder / "te.socket"
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(30)
        assert not (folder / "te.socket").exists()
    finally:
        process.kill()
        process.wait(10)


def test_the_command_serves(server: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(os.path.relpath(server))
        # cmd_get_plugin_names, see docker/healthcheck.py.
        connection.sendall(b"\x05\x00\x00\x00\x08\x01\xfa\x01\x00")
        answer = connection.recv(4096)

    assert b"token-exchange" in answer


def test_the_health_check_of_the_images_tells_a_living_server_from_none(
    server: Path, installed: Path, tmp_path: Path
) -> None:
    assert (0, 1) == (probe(installed, server), probe(installed, server.with_name("nobody.socket")))


def probe(programs: Path, path: Path) -> int:
    """Return the exit status of the images' health check."""
    return subprocess.run(
        [str(programs / "python"), str(ROOT / "docker" / "healthcheck.py")],
        env={"SOCKET": path.name}, cwd=path.parent, check=False, stderr=subprocess.DEVNULL, timeout=60,
    ).returncode  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("minor", [12, 13, 14])
def test_the_wheel_serves_on_every_later_python(
    minor: int, built: dict[str, Path], clone: Path, tmp_path: Path
) -> None:
    python = find_python(minor)
    if python is None:
        pytest.skip(f"no Python 3.{minor} on PATH or in ~/.pyenv")
    run(python, "-m", "venv", tmp_path / "venv")
    programs = tmp_path / "venv" / "bin"
    pinned = ("-c", clone / "constraints.txt")
    run(programs / "python", "-m", "pip", "install", "--quiet", *pinned, built["wheel"])

    assert json.loads(run(programs / "kong-token-exchange", "describe"))["Plugins"]
    with serving(programs, tmp_path) as path:
        assert 0 == probe(programs, path)


def find_python(minor: int) -> Path | None:
    """Return an interpreter of that version that runs; a shim may stand for one that does not."""
    named = shutil.which(f"python3.{minor}")
    found = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3"), reverse=True)
    for python in [*found, *([Path(named)] if named else [])]:
        told = subprocess.run([python, "-V"], capture_output=True, text=True, timeout=60, check=False).stdout
        if told.startswith(f"Python 3.{minor}."):
            return python
    return None


def test_the_list_of_dependencies_is_in_step(installed: Path) -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")

    written = run(installed / "python", ROOT / "docker" / "inventory.py", "--format", "markdown")

    # A newer Python needs fewer backports, so the page may list more.
    assert set(written.splitlines()) <= set(page.splitlines())
