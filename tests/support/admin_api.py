"""
Kong as it is managed: through its Admin API, with a database or without one.

`PostgresCluster` is a throw-away PostgreSQL of the test's own; `AdminApi` speaks to a running
Kong and waits until its workers obey.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import requests

from tests.support.gateways import START_TIMEOUT_S, KongOnPath, Resolve, free_port

# Where distributions put initdb and pg_ctl, which are seldom on PATH.
_POSTGRES_FOLDERS = "/usr/lib/postgresql/*/bin"

# Kong runs some 60 migrations one after the other.
_MIGRATIONS_TIMEOUT_S = 300.0


class PostgresUnavailableError(Exception):
    """There is no PostgreSQL server to start here; the text says what is missing."""


def find_postgres() -> Path:
    """
    Return the folder of `initdb` and `pg_ctl`, the newest one.

    Raises:
        PostgresUnavailableError: there is none, or nobody it may run as.
    """
    found = [path for path in map(shutil.which, ("initdb", "pg_ctl")) if path]
    folders = [Path(path).resolve().parent for path in found[:1]] if len(found) == 2 else []
    folders += sorted(Path("/").glob(_POSTGRES_FOLDERS.lstrip("/")), reverse=True)
    folder = next((one for one in folders if (one / "initdb").exists() and (one / "pg_ctl").exists()), None)
    if folder is None:
        raise PostgresUnavailableError("no initdb and pg_ctl")
    if os.geteuid() == 0 and not shutil.which("runuser"):
        raise PostgresUnavailableError("PostgreSQL does not run as root, and there is no runuser")
    return folder


class PostgresCluster:
    """A cluster in a temporary folder, listening on loopback only; a context manager."""

    def __init__(self) -> None:
        self._programs = find_postgres()
        self.folder = Path(tempfile.mkdtemp(prefix="kte-pg-", dir="/tmp"))
        self.port = free_port()
        self.password = secrets.token_urlsafe(16)
        # PostgreSQL refuses to run as root; Debian's package brings the user.
        self._as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._as_user:
            shutil.chown(self.folder, "postgres")

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop", check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def settings(self) -> dict[str, str]:
        """Return what `kong.conf` says to use this cluster."""
        return {
            "database": "postgres",
            "pg_host": "127.0.0.1",
            "pg_port": str(self.port),
            "pg_user": "kong",
            "pg_password": self.password,
            "pg_database": "kong",
        }

    def _start(self) -> None:
        password_file = self.folder / "password"
        password_file.write_text(self.password, encoding="utf-8")
        if self._as_user:
            shutil.chown(password_file, "postgres")
        password_file.chmod(0o600)
        data = str(self.folder / "data")
        self._run(
            *("initdb", "-D", data, "-U", "kong", "-A", "scram-sha-256", "--pwfile", str(password_file)),
            *("-E", "UTF8", "--no-sync", "--locale=C"),
        )
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder} -c fsync=off -c max_connections=50"
        self._run("pg_ctl", "-D", data, "-l", str(self.folder / "log"), "-o", options, "-w", "start")
        # `initdb -U kong` makes the user; the database of that name is made in the template's place.
        self._make_database()

    def _make_database(self) -> None:
        environment = {**os.environ, "PGPASSWORD": self.password}
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "kong"]
        subprocess.run(
            [str(self._programs / "createdb"), *where, "kong"],
            check=True, capture_output=True, timeout=START_TIMEOUT_S, env=environment,
        )  # fmt: skip

    def _run(self, program: str, *arguments: str, check: bool = True) -> None:
        command = [*self._as_user, str(self._programs / program), *arguments]
        # The server inherits what it is given, so the output goes to a file and not to a pipe.
        with (self.folder / "commands.log").open("ab") as log:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                timeout=START_TIMEOUT_S, check=False, cwd="/",
            )  # fmt: skip
        if check and done.returncode != 0:
            told = (self.folder / "commands.log").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{program} failed:\n{told}")


def run_migrations(cluster: PostgresCluster) -> None:
    """Fill an empty database with Kong's tables."""
    with tempfile.TemporaryDirectory(prefix="kte-migrate-") as folder:
        conf = Path(folder) / "kong.conf"
        values = {**cluster.settings, "prefix": folder, "anonymous_reports": "off"}
        conf.write_text("".join(f"{key} = {value}\n" for key, value in values.items()), encoding="utf-8")
        done = subprocess.run(
            ["kong", "migrations", "bootstrap", "-c", str(conf)],
            capture_output=True, text=True, timeout=_MIGRATIONS_TIMEOUT_S, check=False, cwd=folder,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"kong migrations bootstrap failed:\n{done.stdout}{done.stderr}")


def start_kong(
    *,
    cluster: PostgresCluster | None,
    upstreams: Resolve,
    issuers: Resolve,
    settings: Mapping[str, str] | None = None,
) -> KongOnPath:
    """Start a Kong without any service: DB-less, or on *cluster*."""
    empty: dict[str, Any] = {"_format_version": "3.0"}
    chosen = {**(cluster.settings if cluster else {}), **(settings or {})}
    if cluster is not None:
        # A change is in force for the next request, as far as one worker goes.
        chosen = {"declarative_config": "", "worker_consistency": "strict", **chosen}
    return KongOnPath(empty, upstreams=upstreams, issuers=issuers, settings=chosen)


class AdminApi:
    """The Admin API of one Kong; every call raises unless its status is as expected."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = requests.Session()
        self._session.trust_env = False

    def close(self) -> None:
        self._session.close()

    def call(
        self, method: str, path: str, body: Any = None, *, expect: tuple[int, ...] = (200, 201, 204)
    ) -> Any:
        answer = self._session.request(method, self._url + path, json=body, timeout=60)
        if answer.status_code not in expect:
            raise AssertionError(f"{method} {path}: {answer.status_code} {answer.text[:2000]}")
        return answer.json() if answer.content else None

    def validate(self, config: Mapping[str, Any]) -> tuple[int, Any]:
        """Ask Kong whether it would take this plugin configuration."""
        answer = self._session.post(
            self._url + "/schemas/plugins/validate",
            json={"name": "token-exchange", "config": config},
            timeout=60,
        )
        return answer.status_code, answer.json()

    def load(self, declarative: Mapping[str, Any]) -> None:
        """Replace everything (DB-less)."""
        self.call("POST", "/config", {"config": _as_yaml(declarative)})

    def remove_everything(self) -> None:
        for kind in ("plugins", "routes", "services", "consumers"):
            for entity in self.call("GET", f"/{kind}?size=1000")["data"]:
                self.call("DELETE", f"/{kind}/{entity['id']}")


def _as_yaml(declarative: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(declarative))
