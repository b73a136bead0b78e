"""The backend for Redis and Valkey: streams of messages, leases and records judged in Lua."""

from qtasks_core import Backend
from qtasks_core.options import RETENTION_TIME
from qtasks_core.urls import take_options
from qtasks_redis.broker import RedisBroker
from qtasks_redis.options import LEASE_TIME
from qtasks_redis.storage import RedisStorage

_OPTIONS = {"lease": LEASE_TIME, "retention": RETENTION_TIME}


class RedisBackend(Backend):
    """Answers for `redis://HOST:PORT/DB?lease=SECONDS&retention=SECONDS`.

    `rediss://` is TLS, `valkey://` is Redis by another name. Other options are the driver's
    (`ssl_ca_certs`, `socket_connect_timeout`, …).
    """

    contract = 1

    def broker(self, url: str) -> RedisBroker:
        """Return the broker of `url`. Raises `ConfigurationError` when the URL is wrong."""
        rest, options = take_options(url, _OPTIONS)
        options.pop("retention", None)
        return RedisBroker(rest, **options)

    def storage(self, url: str) -> RedisStorage:
        """Return the storage of `url`. Raises `ConfigurationError` when the URL is wrong."""
        rest, options = take_options(url, _OPTIONS)
        options.pop("lease", None)
        return RedisStorage(rest, **options)


__all__ = ["RedisBackend", "RedisBroker", "RedisStorage"]
