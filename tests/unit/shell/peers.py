"""
Servers on loopback that do exactly what a script says, and certificates for them.

    with Server(lambda peer: peer.answer(b"hello")) as server:
        ... f"http://127.0.0.1:{server.port}/" ...

A script runs once for each connection, in a thread of its own; what it received is kept.
"""

import datetime as dt
import ipaddress
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.fakes import PATIENCE_S


@dataclass
class Received:
    """One request as it came."""

    start_line: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """Return the only header of that name."""
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(values) < 2
        return values[0] if values else None


@dataclass
class Peer:
    """The server's end of one connection."""

    sock: socket.socket
    number: int
    server: "Server"
    buffer: bytes = b""

    def read_request(self) -> Received | None:
        """Read one request; None once the client has left."""
        while b"\r\n\r\n" not in self.buffer:
            if not self._receive():
                return None
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        start_line, *lines = head.decode("latin-1").split("\r\n")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        length = int(next((value for name, value in headers if name.lower() == "content-length"), "0"))
        while len(self.buffer) < length:
            if not self._receive():
                return None
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        request = Received(start_line, headers, body)
        self.server.requests.append(request)
        return request

    def answer(self, body: bytes = b"{}", status: int = 200, *headers: str) -> bool:
        """Read a request and answer it; False once the client has left."""
        if self.read_request() is None:
            return False
        self.send(message(body, status, *headers))
        return True

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def drip(self, data: bytes) -> None:
        """Send one byte after the other, until the client leaves or the test ends."""
        for value in data:
            self.sock.sendall(bytes([value]))
            if self.server.stopping.wait(0.02):
                return

    def wait_until_left(self) -> None:
        """Wait until the client closes or the test ends."""
        while self._receive():
            pass

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close so that the client's next call fails with ECONNRESET."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _receive(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except OSError:
            return False
        self.buffer += data
        return bool(data)


Script = Callable[[Peer], object]


def in_turn(*steps: Script) -> Script:
    """Do one step after the other."""

    def script(peer: Peer) -> None:
        for step in steps:
            step(peer)

    return script


def sending(data: bytes) -> Script:
    """Send *data*."""
    return lambda peer: peer.send(data)


def dripping(data: bytes) -> Script:
    """Send *data* byte by byte."""
    return lambda peer: peer.drip(data)


class Server:
    """A listening socket that runs a script for each connection."""

    def __init__(self, script: Script, *, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Received] = []
        self.connections = 0
        self.stopping = threading.Event()
        self.failures: list[BaseException] = []
        self._script = script
        self._tls = tls
        self._threads: list[threading.Thread] = []
        self._socks: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        # Whoever blocks in accept or recv wakes up.
        with socket.socket() as knock:
            knock.connect(("127.0.0.1", self.port))
        for sock in self._socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        self._listener.close()
        for sock in self._socks:
            sock.close()
        assert [] == self.failures

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            if self.stopping.is_set():
                sock.close()
                return
            self.connections += 1
            sock.settimeout(PATIENCE_S)
            self._socks.append(sock)
            self._start(self._serve, sock, self.connections)

    def _serve(self, sock: socket.socket, number: int) -> None:
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
                self._socks.append(sock)
            peer = Peer(sock, number, self)
            self._script(peer)
            sock.close()
        except OSError:
            # The client left, or refused our certificate: what it made of that is the test's business.
            sock.close()
        except BaseException as error:  # noqa: BLE001 - told when the server ends
            self.failures.append(error)


def message(body: bytes = b"{}", status: int = 200, *headers: str) -> bytes:
    """Return an answer with its length."""
    lines = [f"HTTP/1.1 {status} Reason", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def serve(body: bytes = b"{}", status: int = 200, *headers: str) -> Script:
    """Answer every request of every connection alike."""

    def script(peer: Peer) -> None:
        while peer.answer(body, status, *headers):
            pass

    return script


def closed_port() -> int:
    """Return a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def black_hole() -> Iterator[int]:
    """Give a port that takes no connection and refuses none: its queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(address)
            yield address[1]
        finally:
            for filler in fillers:
                filler.close()


# --- certificates ---------------------------------------------------------------------


@dataclass
class Authority:
    """A certificate authority, and the files it writes."""

    folder: Path
    name: str = "Test CA"
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        self.certificate = (
            _builder(subject, subject, self.key, days=(-1, 30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        self.file = self.folder / f"{self.name.replace(' ', '-')}.pem"
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def context(self, *names: str, days: tuple[int, int] = (-1, 30)) -> ssl.SSLContext:
        """Return a server's context with a certificate for *names*, valid for these days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        certificate = (
            _builder(subject, self.certificate.subject, key, days=days)
            .add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )
        file = self.folder / f"server-{certificate.serial_number}.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: tuple[int, int]
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + dt.timedelta(days=days[0]))
        .not_valid_after(now + dt.timedelta(days=days[1]))
    )


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )
