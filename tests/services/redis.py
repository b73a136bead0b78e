"""Redis for the tests, with an append-only file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.services.container import Contained
from tests.services.install import need_program
from tests.services.native import PASSWORD, Native, free_port
from tests.services.service import NotReady, Service, Way

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

OPTIONS = {"requirepass": PASSWORD, "appendonly": "yes", "appendfsync": "no", "save": ""}


class NativeRedis(Native):
    """Debian's redis-server.

    `appendfsync no`: a write reaches the kernel before it is answered, so what was answered
    survives `kill -9`, though not a failing machine. With `everysec` it does not always: while a
    sync is under way, which on a busy disk takes seconds, answers go out before the write.
    """

    def find(self) -> None:
        self._program = need_program("redis-server", "redis-server")

    def prepare(self) -> str:
        self.port = free_port()
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.directory),
            **OPTIONS,
        }
        return [self._program, *flags(options)]


class ContainedRedis(Contained):
    """Redis by the class of testcontainers, with the options of the native one."""

    inside = 6379

    def make(self, image: str) -> DockerContainer:
        from testcontainers.community.redis import RedisContainer

        container = RedisContainer(image, port=self.inside, password=PASSWORD)
        return container.with_command(["redis-server", *flags(OPTIONS)])

    def url(self) -> str:
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"


def flags(options: dict[str, str]) -> list[str]:
    """Return the options as Redis takes them in its command."""
    return [part for key, value in options.items() for part in (f"--{key}", value)]


class RedisServer(Service):
    name = "redis"

    def native(self) -> Way:
        return NativeRedis()

    def container(self) -> Way:
        return ContainedRedis(self.name)

    async def probe(self, url: str) -> str:
        import redis.asyncio
        import redis.exceptions

        client = redis.asyncio.Redis.from_url(url, socket_timeout=2, retry=None)
        try:
            await client.ping()  # refused while it loads its file; `info` is not
            answer = await client.info("server")
        except (OSError, redis.exceptions.RedisError) as error:
            raise NotReady(str(error)) from error
        finally:
            await client.aclose()
        return str(answer["redis_version"])
