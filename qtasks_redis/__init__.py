"""The backend for Redis and Valkey: streams of messages; Lua scripts handle leases and records."""

from qtasks_core import Backend
from qtasks_core.options import RETENTION_TIME
from qtasks_core.urls import take_options
from qtasks_redis.broker import RedisBroker
from qtasks_redis.options import LEASE_TIME
from qtasks_redis.storage import RedisStorage

_OPTIONS = {"lease": LEASE_TIME, "retention": RETENTION_TIME}


class RedisBackend(Backend):
    """Makes the broker and the storage of `redis://HOST:PORT/DB?lease=SECONDS&retention=SECONDS`.

    `rediss://` uses TLS. `valkey://` means the same as `redis://`. `redis+sentinel://` and
    `redis+cluster://` find the server, `rediss+sentinel://` and `rediss+cluster://` over TLS. The
    driver gets all other options (`ssl_ca_certs`, `socket_connect_timeout`, …).
    """

    contract = 1

    def broker(self, url: str) -> RedisBroker:
        """Return the broker of `url`. Raises `ConfigurationError` if the URL is wrong."""
        rest, options = take_options(url, _OPTIONS)
        options.pop("retention", None)
        return RedisBroker(rest, **options)

    def storage(self, url: str) -> RedisStorage:
        """Return the storage of `url`. Raises `ConfigurationError` if the URL is wrong."""
        rest, options = take_options(url, _OPTIONS)
        options.pop("lease", None)
        return RedisStorage(rest, **options)


__all__ = ["RedisBackend", "RedisBroker", "RedisStorage"]
