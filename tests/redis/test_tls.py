"""A wrong set-up of TLS is one error at the start, which says what to set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qtasks.testing.native import free_port
from qtasks.testing.recipes import PASSWORD
from qtasks_core import Task
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_redis import RedisBackend
from tests.services.redis import NativeRedis, RedisServer
from tests.services.secured_kafka import Certificates
from tests.services.service import Way


class NativeSecuredRedis(NativeRedis):
    """One with a port for TLS beside the plain one."""

    def prepare(self) -> str:
        self.tls = free_port()
        self.certificates = Certificates(self.directory)
        return super().prepare()

    def command(self) -> list[str]:
        return [
            *super().command(),
            "--bind", "127.0.0.1", "127.0.0.2",
            "--tls-port", str(self.tls), "--tls-auth-clients", "no",
            "--tls-cert-file", str(self.directory / "localhost.crt"),
            "--tls-key-file", str(self.directory / "localhost.key"),
            "--tls-ca-cert-file", str(self.certificates.authority),
        ]  # fmt: skip


class SecuredRedis(RedisServer):
    """The server as a service; `way` knows its other port and its certificates."""

    def ways(self) -> tuple[Way, ...]:
        return (self.native(),)

    def native(self) -> NativeSecuredRedis:
        self.way = NativeSecuredRedis()
        return self.way


@pytest.fixture(scope="module")
def secured() -> Iterator[NativeSecuredRedis]:
    service = SecuredRedis()
    try:
        service.start()
        yield service.way
    finally:
        service.stop()


async def test_with_the_authority_it_works(secured: NativeSecuredRedis) -> None:
    url = f"rediss://:{PASSWORD}@127.0.0.1:{secured.tls}?ssl_ca_certs="
    storage = RedisBackend().storage(url + str(secured.certificates.authority))
    await storage.start("tests")
    record = Task(uuid="a", task_name="tests:task", status="success")
    await storage.save([record])
    assert await storage.get(["a"]) == [record]
    await storage.stop()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("rediss://:{pw}@127.0.0.1:{tls}", "not trusted.*ssl_ca_certs"),
        ("rediss://:{pw}@127.0.0.1:{tls}?ssl_ca_certs={other}", "not trusted.*ssl_ca_certs"),
        ("rediss://:{pw}@127.0.0.2:{tls}?ssl_ca_certs={good}", "127.0.0.2.*the host"),
        ("rediss://:{pw}@127.0.0.1:{tls}?ssl_ca_certs=/none.pem", "No such file.*ssl_ca_certs"),
        ("rediss://:{pw}@127.0.0.1:{tls}?ssl_ca_certs={key}", "TLS fails.*ssl_ca_certs"),
        ("rediss://:{pw}@127.0.0.1:{tls}?ssl_certfile=/no&ssl_keyfile=/no", "file.*ssl_certfile"),
        ("rediss://:{pw}@127.0.0.1:{tls}?ssl_cert_reqs=maybe", "none, optional, required"),
        ("rediss://:{pw}@127.0.0.1:{plain}?ssl_ca_certs={good}", "no TLS.*redis://"),
        ("redis://:{pw}@127.0.0.1:{tls}", "rediss://"),
    ],
)
async def test_what_is_wrong_is_told_at_the_start(
    secured: NativeSecuredRedis, tmp_path: Path, url: str, told: str
) -> None:
    values = {
        "pw": PASSWORD, "tls": secured.tls, "plain": secured.port,
        "good": secured.certificates.authority, "key": secured.directory / "localhost.key",
    }  # fmt: skip
    if "{other}" in url:
        values["other"] = Certificates(tmp_path).authority
    for part in (RedisBackend().broker, RedisBackend().storage):
        with pytest.raises(ConfigurationError, match=told) as error:
            await part(url.format(**values)).start("tests")
        assert PASSWORD not in str(error.value)


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_a_server_that_is_away_is_no_matter_of_tls(scheme: str) -> None:
    with pytest.raises(Unavailable):
        await RedisBackend().broker(f"{scheme}://127.0.0.1:{free_port()}").start("tests")
