"""
Runs a real Keycloak on loopback, without containers, for trying and testing.

The distribution comes from `KEYCLOAK_HOME`, else from a cache folder that Maven fills once.
Needs Java 17 or later; what it needs and what Keycloak answers is told in `docs/keycloak.md`.
"""

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import requests

VERSION: Final = "26.7.3"
ZIP_SIZE: Final = 176_710_367
ZIP_SHA256: Final = "27a6535553c3cdcd083872ba40629efafb3475e3b758e0c6f691395561dd0f1f"

HOSTNAME: Final = "http://keycloak:8080"

# The JWT Authorization Grant is supported, and on by default, from 26.6 on.
_MIN_VERSION: Final = (26, 6)
_MIN_JAVA: Final = 17

_MAVEN_PLUGIN: Final = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1"
_ARTIFACT: Final = "org.keycloak:keycloak-quarkus-dist"

# Bounds for everything that waits, in seconds.
_FETCH_TIMEOUT: Final = 900.0
_BUILD_TIMEOUT: Final = 240.0
_START_TIMEOUT: Final = 120.0
_STOP_TIMEOUT: Final = 15.0
_JAVA_VERSION_TIMEOUT: Final = 20.0
_REQUEST_TIMEOUT: Final = 20.0

_LOG_TAIL_LINES: Final = 30

# What `build` bakes in. A start with other build options would re-augment, or fail under --optimized.
_BUILD_OPTIONS: Final = ("--db=dev-mem",)

_THREAD_FACTORY: Final = "io.quarkus.bootstrap.forkjoin.QuarkusForkJoinWorkerThreadFactory"

# `kc.sh` is a shell around this command line; without the shell the process we start is the JVM, and a
# signal reaches it. The serial collector and C1 alone take a third off the CPU seconds of a start.
_JVM_OPTIONS: Final = (
    "-Xms64m",
    "-Xmx512m",
    "-XX:MaxMetaspaceSize=256m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:+ExitOnOutOfMemoryError",
    "-Dfile.encoding=UTF-8",
    "-Djava.security.egd=file:/dev/urandom",
    "--add-opens=java.base/java.util=ALL-UNNAMED",
    "--add-opens=java.base/java.util.concurrent=ALL-UNNAMED",
    "--add-opens=java.base/java.security=ALL-UNNAMED",
    "--add-opens=java.base/java.lang=ALL-UNNAMED",
    "--enable-native-access=ALL-UNNAMED",
    "-Duser.language=en",
    "-Duser.country=US",
    f"-Djava.util.concurrent.ForkJoinPool.common.threadFactory={_THREAD_FACTORY}",
    "-Djava.util.logging.manager=org.jboss.logmanager.LogManager",
    "-Dpicocli.disable.closures=true",
    "-Dquarkus-log-max-startup-records=10000",
)

# Waits for the end of a pipe whose other end only the Python process holds, then kills the JVM's process
# group and removes its folder. PR_SET_PDEATHSIG would fire when the *thread* that forked ends.
_WATCHDOG: Final = 'read -r _; kill -9 "-$1" 2>/dev/null; rm -rf -- "$2"'


class KeycloakUnavailableError(RuntimeError):
    """
    Keycloak cannot run here; the text says what is missing.
    """


class KeycloakStartError(RuntimeError):
    """
    Keycloak was started and did not become ready; the text ends with the tail of its log.
    """


def find_distribution() -> Path:
    """
    Return the folder of a Keycloak distribution, fetching it when none is there.

    `KEYCLOAK_HOME` wins and is never written to.

    Raises:
        KeycloakUnavailableError: Java or Maven is missing or too old, `KEYCLOAK_HOME` is not a Keycloak
            or too old, or the archive could not be fetched or is not the one we know.
    """
    _find_java()
    given = os.environ.get("KEYCLOAK_HOME")
    if given:
        home = Path(given)
        if read_version(home) < _MIN_VERSION:
            raise KeycloakUnavailableError(f"KEYCLOAK_HOME={given}: Keycloak 26.6 or later is needed")
        return home
    home = _cache_folder() / f"keycloak-{VERSION}"
    if not home.is_dir():
        _install(home, _fetch_distribution)
    return home


def read_version(home: Path) -> tuple[int, ...]:
    """
    Read the version of the distribution in *home* from its `version.txt`.

    Raises:
        KeycloakUnavailableError: the file is missing or says something else.
    """
    try:
        text = (home / "version.txt").read_text(encoding="utf-8")
    except OSError as exc:
        raise KeycloakUnavailableError(f"{home} is not a Keycloak distribution: {exc.strerror}") from exc
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    if found is None:
        raise KeycloakUnavailableError(f"{home} is not a Keycloak distribution: no version in version.txt")
    return tuple(int(part) for part in found.groups())


class Keycloak:
    """
    One running Keycloak, listening on loopback under its stable public name.

    `base_url` is where it listens; tokens and discovery name `hostname` instead, so that one `kong.yml`
    serves here and in a compose network. Clients map the one to the other themselves.
    """

    def __init__(
        self,
        *,
        process: subprocess.Popen[bytes],
        watchdog: subprocess.Popen[bytes],
        run: Path,
        version: str,
        hostname: str,
        port: int,
    ) -> None:
        """
        Take over a process that `start` began; call `start` instead.
        """
        self.version = version
        self.hostname = hostname
        self.port = port
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.log = run / "keycloak.log"
        self._process = process
        self._watchdog = watchdog
        self._run = run

    @classmethod
    def start(cls, *, realms: Path, hostname: str = HOSTNAME, port: int = 0) -> Self:
        """
        Start Keycloak with the realms of a folder and return once it answers for each of them.

        Args:
            realms: folder of `*-realm.json` files, named after their realms.
            hostname: public base URL, the first part of every issuer.
            port: loopback port; 0 picks a free one, and another if somebody takes it meanwhile.

        Raises:
            KeycloakUnavailableError: as `find_distribution`.
            KeycloakStartError: not ready after 120 s, or ended early.
        """
        home = _build(find_distribution())
        try:
            return cls._start_once(home, realms=realms, hostname=hostname, port=port or _free_port())
        except KeycloakStartError as exc:
            if port or "in use" not in str(exc):
                raise
        return cls._start_once(home, realms=realms, hostname=hostname, port=_free_port())

    @classmethod
    def _start_once(cls, home: Path, *, realms: Path, hostname: str, port: int) -> Self:
        run = Path(tempfile.mkdtemp(prefix="kong-token-exchange-keycloak-"))
        try:
            names = _lay_out_run_folder(run, home=home, realms=realms)
        except BaseException:
            shutil.rmtree(run, ignore_errors=True)
            raise
        command = _java_command(
            run,
            "start",
            "--optimized",
            "--import-realm",
            # Without it Keycloak opens a cluster port on every interface.
            "--cache=local",
            "--http-enabled=true",
            "--http-host=127.0.0.1",
            f"--http-port={port}",
            f"--hostname={hostname}",
        )
        # The realm import replaces ${KC_HTTP_PORT}: realm internal fetches partner's keys over loopback.
        environment = _java_environment() | {"KC_HTTP_PORT": str(port)}
        with (run / "keycloak.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=run,
                env=environment,
                start_new_session=True,
            )
        watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "watchdog", str(process.pid), str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        version = ".".join(str(part) for part in read_version(home))
        started = cls(
            process=process, watchdog=watchdog, run=run, version=version, hostname=hostname, port=port
        )
        try:
            started._await_ready(names)
        except BaseException:
            started.stop()
            raise
        return started

    def issuer(self, realm: str) -> str:
        """
        Return the issuer identifier of *realm*, as its tokens carry it.
        """
        return f"{self.hostname}/realms/{realm}"

    def token_endpoint(self, realm: str) -> str:
        """
        Return the token endpoint of *realm* as it is reached from this machine.
        """
        return f"{self.base_url}/realms/{realm}/protocol/openid-connect/token"

    def mint(
        self, *, realm: str, client_id: str, client_secret: str, username: str, password: str, scope: str = ""
    ) -> str:
        """
        Log a user in by the password grant and return the access token.

        Raises:
            requests.HTTPError: Keycloak refused.

        Source: RFC 6749 section 4.3.
        """
        form = {"grant_type": "password", "username": username, "password": password}
        if scope:
            # Keycloak answers an empty scope with 400 invalid_scope.
            form["scope"] = scope
        with requests.Session() as session:
            session.trust_env = False
            response = session.post(
                self.token_endpoint(realm),
                data=form,
                auth=(client_id, client_secret),
                timeout=_REQUEST_TIMEOUT,
                allow_redirects=False,
            )
        response.raise_for_status()
        return str(response.json()["access_token"])

    def stop(self) -> None:
        """
        End Keycloak and remove its folder; may be called again.
        """
        self._watchdog.kill()
        self._watchdog.communicate()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                break
            os.killpg(self._process.pid, number)
            try:
                self._process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                continue
        shutil.rmtree(self._run, ignore_errors=True)

    def __enter__(self) -> Self:
        """
        Return itself; the end of the block stops Keycloak.
        """
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """
        Stop Keycloak.
        """
        self.stop()

    def _await_ready(self, realms: Sequence[str]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        waiting = list(realms)
        with requests.Session() as session:
            session.trust_env = False
            while waiting:
                if self._process.poll() is not None:
                    raise KeycloakStartError(
                        f"Keycloak ended with {self._process.returncode}:\n{_tail(self.log)}"
                    )
                if time.monotonic() > deadline:
                    raise KeycloakStartError(
                        f"Keycloak not ready after {_START_TIMEOUT:.0f} s:\n{_tail(self.log)}"
                    )
                if self._answers_for(waiting[0], session):
                    del waiting[0]
                else:
                    time.sleep(0.1)

    def _answers_for(self, realm: str, session: requests.Session) -> bool:
        url = f"{self.base_url}/realms/{realm}/.well-known/openid-configuration"
        try:
            response = session.get(url, timeout=5, allow_redirects=False)
            document = response.json()
        except (requests.RequestException, ValueError):
            return False
        return isinstance(document, dict) and document.get("issuer") == self.issuer(realm)


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "kong-token-exchange"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _install(target: Path, make: Callable[[Path], Path]) -> None:
    # Made aside and renamed, so that a second run sees either nothing or all of it.
    scratch = Path(tempfile.mkdtemp(prefix=".installing-", dir=target.parent))
    try:
        made = make(scratch)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fetch_distribution(scratch: Path) -> Path:
    maven = shutil.which("mvn")
    if maven is None:
        raise KeycloakUnavailableError("no mvn on PATH to fetch Keycloak with, and KEYCLOAK_HOME is not set")
    artifact = f"{_ARTIFACT}:{VERSION}:zip"
    command = [
        maven,
        "-B",
        "-q",
        f"{_MAVEN_PLUGIN}:copy",
        f"-Dartifact={artifact}",
        f"-DoutputDirectory={scratch}",
    ]
    _run_bounded(command, timeout=_FETCH_TIMEOUT, what=f"fetching {artifact}", cwd=scratch)
    archive = scratch / f"keycloak-quarkus-dist-{VERSION}.zip"
    _check_archive(archive)
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            path = packed.extract(member, scratch)
            mode = member.external_attr >> 16
            if mode and not member.is_dir():
                Path(path).chmod(mode & 0o777)
    archive.unlink()
    return scratch / f"keycloak-{VERSION}"


def _check_archive(archive: Path) -> None:
    try:
        size = archive.stat().st_size
        with archive.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as exc:
        raise KeycloakUnavailableError(f"fetching Keycloak left no archive: {exc.strerror}") from exc
    if (size, digest) != (ZIP_SIZE, ZIP_SHA256):
        raise KeycloakUnavailableError(
            f"the fetched {archive.name} is not the known one: {size} bytes, SHA-256 {digest}"
        )


def _build(distribution: Path) -> Path:
    # `build` rewrites lib/quarkus, so it works on a copy: that folder is copied, other files are linked.
    source = distribution.resolve()
    unpacked = (source / "lib" / "quarkus-run.jar").stat().st_mtime_ns
    identity = "\0".join([str(source), str(read_version(source)), str(unpacked), *_BUILD_OPTIONS])
    target = _cache_folder() / f"keycloak-built-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def make(scratch: Path) -> Path:
        home = scratch / "home"
        for part in ("bin", "conf", "lib", "providers", "themes"):
            if (source / part).is_dir():
                shutil.copytree(source / part, home / part, copy_function=_link_or_copy)
        shutil.copy2(source / "version.txt", home / "version.txt")
        command = _java_command(home, "build", *_BUILD_OPTIONS)
        _run_bounded(
            command, timeout=_BUILD_TIMEOUT, what="building Keycloak", cwd=home, env=_java_environment()
        )
        return home

    if not target.is_dir():
        _install(target, make)
    return target


def _link_or_copy(source: str, target: str) -> None:
    if Path(source).parent.name == "quarkus":
        shutil.copy2(source, target)
    else:
        Path(target).symlink_to(source)


def _lay_out_run_folder(run: Path, *, home: Path, realms: Path) -> list[str]:
    # A folder of its own for data/, shared read-only folders for the rest: runs do not meet.
    for part in home.iterdir():
        if part.name != "data":
            (run / part.name).symlink_to(part)
    imported = run / "data" / "import"
    imported.mkdir(parents=True)
    files = sorted(realms.glob("*-realm.json"))
    if not files:
        raise KeycloakStartError(f"no *-realm.json in {realms}")
    for file in files:
        shutil.copy(file, imported)
    return [file.name.removesuffix("-realm.json") for file in files]


def _find_java() -> str:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=str(Path(home) / "bin")) if home else None
    java = java or shutil.which("java")
    if java is None:
        raise KeycloakUnavailableError("no java on PATH: Keycloak needs Java 17 or later")
    try:
        told = subprocess.run(
            [java, "-version"], capture_output=True, text=True, check=True, timeout=_JAVA_VERSION_TIMEOUT
        ).stderr
    except (OSError, subprocess.SubprocessError) as exc:
        raise KeycloakUnavailableError(f"{java} -version failed: {type(exc).__name__}") from exc
    found = re.search(r'version "(\d+)', told)
    if found is None or int(found[1]) < _MIN_JAVA:
        raise KeycloakUnavailableError(f"{java} is too old: Keycloak needs Java 17 or later")
    return java


def _java_environment() -> dict[str, str]:
    # An option meant for another Keycloak would change ours.
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KC_", "KEYCLOAK_", "QUARKUS_"))
    }


def _java_command(home: Path, *arguments: str) -> list[str]:
    return [
        _find_java(),
        *_JVM_OPTIONS,
        f"-Dkc.home.dir={home}",
        f"-Djboss.server.config.dir={home / 'conf'}",
        "-cp",
        str(home / "lib" / "quarkus-run.jar"),
        "io.quarkus.bootstrap.runner.QuarkusEntryPoint",
        *arguments,
    ]


def _run_bounded(
    command: Sequence[str], *, timeout: float, what: str, cwd: Path, env: dict[str, str] | None = None
) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as exc:
        raise KeycloakUnavailableError(f"{what}: not done after {timeout:.0f} s") from exc
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-_LOG_TAIL_LINES:])
        raise KeycloakUnavailableError(f"{what} failed with {done.returncode}:\n{tail}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as exc:
        return f"(no log: {exc.strerror})"
    return "\n".join(lines[-_LOG_TAIL_LINES:])
