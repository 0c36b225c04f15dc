"""Everything that a row needs, on loopback: a gateway, identity providers, the upstream, the client."""

from __future__ import annotations

import shutil
import ssl
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.chaos.certificates import Authority
from tests.chaos.gateways import ChaosGateway, ChaosKong, ChaosSandbox
from tests.chaos.idp import SECRET, ChaosIdp
from tests.chaos.traffic import AUDIENCE, REALM, Books, Client, Upstream, Wallet

PLAIN, SECURE, NODNS = (
    "http://keycloak:8080",
    "https://secure.chaos.test:8443",
    "http://nodns.chaos.invalid:8080",
)
SECURE_HOST = "secure.chaos.test"

# Scaled: the product's defaults are 5,000 each.
DEADLINE_MS = 2000
BREAKER_OPEN_MS = 2000


class Stage:
    """
    One gateway with all around it; a context manager.

    Args:
        kind: `sandbox` or `kong`.
        deadline_ms: `token_exchange.deadline` of every route.
        seed: Of all that is random.
    """

    def __init__(self, kind: str, *, deadline_ms: int = DEADLINE_MS, seed: int = 1) -> None:
        self.kind = kind
        self.deadline_ms = deadline_ms
        self.folder = Path(tempfile.mkdtemp(prefix="kte-chaos-", dir="/tmp"))
        self.authority = Authority.make("chaos test authority")
        self.stranger = Authority.make("somebody else")
        self.ca_file = self.authority.write(self.folder / "ca.pem")
        self.good_tls = self.authority.server_context(self.folder, "good", SECURE_HOST)
        self.idp = ChaosIdp(PLAIN, ["internal", "second"])
        self.secure_idp = ChaosIdp(SECURE, ["secure"], tls=self.good_tls)
        self.nodns_idp = ChaosIdp(NODNS, ["nodns"])
        self.idps = (self.idp, self.secure_idp, self.nodns_idp)
        self.books = Books()
        self.upstream = Upstream(self.books, self.idps)
        issuers = {name: issuer for idp in self.idps for name, issuer in idp.issuers.items()}
        self.wallet = Wallet(issuers, self.books, seed)
        self.client = Client(self.books)
        self.gateway: ChaosGateway
        self._started: list[Any] = []

    def __enter__(self) -> Self:
        try:
            for server in (self.idp, self.secure_idp, self.upstream):
                server.start()
                self._started.append(server)
            make = ChaosKong if self.kind == "kong" else ChaosSandbox
            folder = self.folder / "g"
            folder.mkdir()
            self.gateway = make(
                folder,
                self.config(),
                upstreams={"upstream:8080": self.upstream.address},
                issuers={
                    "keycloak:8080": self.idp.address,
                    f"{SECURE_HOST}:8443": self.secure_idp.address,
                },
            )
            self._started.append(self.gateway)
            self.client.start(self.gateway.url)
            self._started.append(self.client)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in reversed(self._started):
            server.stop()
        self._started.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def config(self, **changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the declarative configuration; *changes* are of a route's plugin, by route name."""
        routes = [self._route(path, changes.get(path.strip("/"), {})) for path in AUDIENCE]
        service = {"name": "api", "url": "http://upstream:8080", "routes": routes}
        return {"_format_version": "3.0", "services": [service]}

    def _route(self, path: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        name, audience = path.strip("/"), AUDIENCE[path]
        realm = REALM.get(path, "internal")
        base = {"secure": SECURE, "nodns": NODNS}.get(realm, PLAIN)
        issuer = f"{base}/realms/{realm}"
        scopes = [changes.get("scope", "reports" if audience == "reports-api" else "orders")]
        config: dict[str, Any] = {
            "issuer": issuer,
            "insecure_allow_http": True,
            "client_id": ["client-2"],
            "client_secret": [changes.get("secret", SECRET)],
            "auth_methods": ["bearer"],
            "audience_required": [changes.get("audience", audience)],
            "leeway": changes.get("leeway", 0),
            "ca_file": str(self.ca_file),
            "token_exchange": {
                "grant_type": "token_exchange",
                "deadline": self.deadline_ms,
                "breaker": {"open_for": BREAKER_OPEN_MS},
                # The same subject tokens pass both routes; each names the other's configuration.
                "subject_token_issuers": [{"issuer": issuer, "conditions": {"has_audience": ["client-2"]}}],
                "request": {"scopes": scopes},
                "flow": {"name": f"chaos-{name}", "kind": "transformation", "owner": "chaos"},
            },
        }
        config.update(changes.get("config", {}))
        plugin: dict[str, Any] = {"name": "token-exchange", "config": config}
        if changes.get("enabled") is False:
            plugin["enabled"] = False
        return {"name": name, "paths": [path], "strip_path": False, "plugins": [plugin]}

    def tls(self, label: str, **options: Any) -> ssl.SSLContext:
        """Return a server context of the stage's authority, or of another."""
        authority = options.pop("authority", self.authority)
        host = options.pop("host", SECURE_HOST)
        context: ssl.SSLContext = authority.server_context(self.folder, label, host, **options)
        return context
