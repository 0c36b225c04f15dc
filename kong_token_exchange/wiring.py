"""
The one place where shells are built and handed to the plugin.

Called in the process that serves, after any fork: connections, threads and caches are never
shared between processes (docs/adr/0002-own-plugin-server.md).
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping

from kong_token_exchange.config import PluginConfig
from kong_token_exchange.core.policy import BreakerPolicy, SharedCachePolicy
from kong_token_exchange.errors import (
    ConfigError,
    DeadlineError,
    GatewayError,
    IssuerUnavailableError,
    MalformedRequestError,
)
from kong_token_exchange.flow import Flow
from kong_token_exchange.plugin import TokenExchangePlugin
from kong_token_exchange.pluginserver.faults import Faults, make_faults
from kong_token_exchange.ports import SharedCache
from kong_token_exchange.protocol.bearer import render
from kong_token_exchange.schema import MAX_DEADLINE_MS
from kong_token_exchange.shell.audit_log import AuditLog, CountingMetrics
from kong_token_exchange.shell.breaker import GuardedSender
from kong_token_exchange.shell.clock import SystemClock
from kong_token_exchange.shell.connections import trust_context
from kong_token_exchange.shell.exchange_client import ExchangeSender
from kong_token_exchange.shell.http_client import RequestsSender
from kong_token_exchange.shell.key_source import IssuerKeySource
from kong_token_exchange.shell.proof_memory import SharedProofMemory
from kong_token_exchange.shell.refresher import BackgroundRefresher
from kong_token_exchange.shell.secret_file import SecretFile
from kong_token_exchange.shell.token_cache import MAX_BYTES, MAX_ENTRIES, MemoryTokenCache

_metrics_log = logging.getLogger("kong_token_exchange.metrics")


class Shells:
    """
    The shells of one process, shared by all plugin instances that have the same settings.

    Args:
        ca_file: Default for configurations without a `ca_file` of their own.
        resolve: `host:port` to (address, port), for trying and testing.
        proofs: The memory that the workers of one server share, made before they were forked.
        cache_entries: Most tokens in each part of the cache, verified and exchanged.
        cache_bytes: Most estimated bytes in both parts together.

    Raises:
        ValueError: a bound of the cache below 1.
    """

    def __init__(
        self,
        *,
        ca_file: str | None = None,
        resolve: Mapping[str, tuple[str, int]] | None = None,
        proofs: SharedProofMemory | None = None,
        cache_entries: int = MAX_ENTRIES,
        cache_bytes: int = 2 * MAX_BYTES,
    ) -> None:
        if min(cache_entries, cache_bytes) < 1:
            raise ValueError("the cache needs room for one entry at least")
        self.clock = SystemClock()
        self.proofs = proofs or SharedProofMemory(now=self.clock.now())
        self.metrics = CountingMetrics()
        self.audit = AuditLog(self.clock)
        self.cache = MemoryTokenCache(
            self.clock, metrics=self.metrics, max_entries=cache_entries, max_bytes=cache_bytes // 2
        )
        self.refresher = BackgroundRefresher()
        self._ca_file = ca_file
        self._resolve = dict(resolve or {})
        self._lock = threading.Lock()
        # Keyed by every setting that shapes a connection or a fetched document (EXC-30).
        self._senders: dict[tuple[str | None, bool, int], tuple[RequestsSender, ExchangeSender]] = {}
        self._guards: dict[tuple[str | None, bool, int, BreakerPolicy], GuardedSender] = {}
        self._key_sources: dict[tuple[str | None, bool, int, bool], IssuerKeySource] = {}
        self._secret_files: dict[str, SecretFile] = {}
        self._shared_caches: dict[tuple[SharedCachePolicy, str | None], SharedCache] = {}

    def make_flow(self, config: PluginConfig) -> Flow:
        """
        Build the flow of one configuration.

        Raises:
            ConfigError: `ca_file` cannot be read.
        """
        ca_file = config.ca_file or self._ca_file
        settings = (ca_file, config.ssl_verify, config.timeout_ms)
        with self._lock:
            try:
                sender, exchange_sender = self._senders.get(settings) or self._make_senders(config, ca_file)
            except (OSError, ValueError):
                raise ConfigError("ca_file", "cannot be read as PEM certificates") from None
            self._senders[settings] = sender, exchange_sender
            guard_key = (*settings, config.breaker)
            guard = self._guards.get(guard_key) or GuardedSender(
                exchange_sender, self.clock, self.metrics, policy=config.breaker
            )
            self._guards[guard_key] = guard
            source_key = (*settings, config.insecure_allow_http)
            keys = self._key_sources.get(source_key) or IssuerKeySource(
                sender, self.clock, allow_http=config.insecure_allow_http, metrics=self.metrics
            )
            self._key_sources[source_key] = keys
            secrets = self._secret_file(config.client.client_secret_file)
            shared = None if config.shared_cache is None else self._shared(config.shared_cache, ca_file)
        return Flow(
            config,
            sender=guard,
            keys=keys,
            cache=self.cache,
            clock=self.clock,
            audit=self.audit,
            metrics=self.metrics,
            proofs=self.proofs,
            refresher=self.refresher,
            secrets=secrets,
            shared=shared,
        )

    def _secret_file(self, path: str | None) -> SecretFile | None:
        """Return the one reader of *path*: instances that share a file see one rotation."""
        return self._secret_files.setdefault(path, SecretFile(path, self.clock)) if path else None

    def _make_senders(
        self, config: PluginConfig, ca_file: str | None
    ) -> tuple[RequestsSender, ExchangeSender]:
        verify, seconds, resolve = config.ssl_verify, config.timeout_ms / 1000, self._resolve
        return (
            RequestsSender(ca_file=ca_file, verify=verify, read_timeout_s=seconds, resolve=resolve),
            ExchangeSender(ca_file=ca_file, verify=verify, read_timeout_s=seconds, resolve=resolve),
        )

    def close(self) -> None:
        """Close the connections that lie idle."""
        with self._lock:
            for documents, exchanges in self._senders.values():
                documents.close()
                exchanges.close()
            for shared in self._shared_caches.values():
                shared.close()

    def _shared(self, policy: SharedCachePolicy, ca_file: str | None) -> SharedCache:
        """Return the second level of these settings, made once; call it with the lock held."""
        key = (policy, ca_file)
        made = self._shared_caches.get(key)
        if made is None:
            try:
                # Its library is an extra: who does not ask for Redis need not have it.
                from kong_token_exchange.shell.redis_cache import RedisTokenCache  # noqa: PLC0415
                from kong_token_exchange.shell.redis_store import RedisStore  # noqa: PLC0415
            except ImportError:
                raise ConfigError(
                    "cluster_cache_strategy", "redis needs: pip install kong-token-exchange[redis]"
                ) from None
            context = None
            if policy.redis.ssl:
                try:
                    context = trust_context(ca_file, verify=policy.redis.ssl_verify)
                except (OSError, ValueError):
                    raise ConfigError("ca_file", "cannot be read as PEM certificates") from None
            made = self._shared_caches[key] = RedisTokenCache(
                RedisStore(policy.redis, context),
                seal_keys=policy.seal_keys,
                clock=self.clock,
                metrics=self.metrics,
                timeout_s=policy.redis.timeout_s,
            )
        return made

    def report(self) -> None:
        """Write one line with the counters, the times and what the caches hold."""
        times = {
            name: {
                "count": times.count,
                "mean_ms": round(1000 * times.total / times.count, 1),
                "max_ms": round(1000 * times.longest, 1),
            }
            for name, times in self.metrics.times().items()
        }
        line = {
            "event": "counters",
            "pid": os.getpid(),
            "counters": dict(sorted(self.metrics.snapshot().items())),
            "times": times,
            "cache": self.cache.sizes(),
        }
        _metrics_log.info("%s", json.dumps(line, separators=(",", ":")))

    def make_plugin(self, *, max_deadline_ms: int = MAX_DEADLINE_MS) -> TokenExchangePlugin:
        """Return the plugin over these shells."""
        return TokenExchangePlugin(self.make_flow, self.clock, max_deadline_ms=max_deadline_ms)


def constant_faults() -> Faults:
    """Return the plugin server's own answers with the very bodies that the plugin gives."""
    return make_faults(
        render(GatewayError(reason="exchange_failed")).body,
        too_large_body=render(MalformedRequestError(reason="credential_too_long")).body,
        overloaded_body=render(IssuerUnavailableError(reason="exchange_shed")).body,
        timed_out_body=render(DeadlineError(reason="deadline")).body,
    )
