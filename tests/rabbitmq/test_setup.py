"""What is wrong for good is one clear error; what may pass is an outage, whoever asks."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtasks.testing.native import free_port
from qtasks_core import Task
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_rabbitmq import RabbitMQBackend, RabbitMQBroker, RabbitMQStorage
from tests.rabbitmq.test_broker import collect, message
from tests.services.rabbitmq import RabbitMQServer


@pytest.fixture
def vhost(rabbitmq_server: RabbitMQServer, namespace: str) -> Iterator[str]:
    """A virtual host of the test's own."""
    rabbitmq_server.control("add_vhost", namespace)
    rabbitmq_server.control("set_permissions", "-p", namespace, "guest", ".*", ".*", ".*")
    yield namespace
    rabbitmq_server.control("delete_vhost", namespace)


async def test_a_limit_of_connections_passes(rabbitmq_server: RabbitMQServer, vhost: str) -> None:
    """One who is refused for it hears an outage, and comes in when there is room."""
    rabbitmq_server.control("set_vhost_limits", "-p", vhost, '{"max-connections": 1}')
    first, second = (RabbitMQBroker(rabbitmq_server.url + vhost) for _ in range(2))
    try:
        await first.start("app")
        with pytest.raises(Unavailable, match="limit"):
            await second.start("app")
        await first.stop()
        async with asyncio.timeout(120):
            while True:
                try:
                    await second.start("app")
                    break
                except Unavailable:
                    await asyncio.sleep(0.1)
    finally:
        await first.stop()
        await second.stop()


async def test_a_virtual_host_that_is_down_passes(
    rabbitmq_server: RabbitMQServer, vhost: str
) -> None:
    stop = f'rabbit_vhost_sup_sup:stop_and_delete_vhost(<<"{vhost}">>), rabbit_vhost:list().'
    broker = RabbitMQBroker(rabbitmq_server.url + vhost)
    rabbitmq_server.control("eval", stop)
    try:
        with pytest.raises(Unavailable, match="down"):
            await broker.start("app")
        rabbitmq_server.control("restart_vhost", "-p", vhost)
        await broker.start("app")
    finally:
        await broker.stop()


async def test_a_user_without_a_right_is_told_which(
    rabbitmq_server: RabbitMQServer, vhost: str
) -> None:
    rabbitmq_server.control("set_permissions", "-p", vhost, "guest", "", "", "")
    for part in (RabbitMQBroker, RabbitMQStorage):
        made = part(rabbitmq_server.url + vhost)
        with pytest.raises(ConfigurationError, match="docs/rights"):
            await made.start("app")
        await made.stop()


async def test_a_message_over_the_servers_limit_is_refused_alone(
    rabbitmq_server: RabbitMQServer, namespace: str
) -> None:
    """Neither the others of its batch nor other calls notice, on both halves."""
    url = rabbitmq_server.url
    rabbitmq_server.control("eval", "application:set_env(rabbit, max_message_size, 200000).")
    broker, storage = RabbitMQBroker(url), RabbitMQStorage(url)
    try:
        await broker.start(namespace)
        await storage.start(namespace)
        large = [message(args=b"x" * size) for size in (10, 700_000, 10)]
        batches = await asyncio.gather(
            broker.publish(large), *(broker.publish([message()]) for _ in range(5))
        )
        assert [o.status for o in batches[0]] == ["done", "refused", "done"]
        assert "max_message_size of 200000" in batches[0][1].reason
        assert {o.status for batch in batches[1:] for o in batch} == {"done"}
        records = [
            Task(uuid=str(size), task_name="t", status="success", returning=b"x" * size)
            for size in (10, 700_000, 20)
        ]
        saves = await asyncio.gather(
            storage.save(records),
            *(
                storage.save([Task(uuid=f"other{n}", task_name="t", status="success")])
                for n in range(5)
            ),
        )
        assert [o.status for o in saves[0]] == ["done", "refused", "done"]
        assert saves[0][1].current is None
        assert "max_message_size of 200000" in saves[0][1].reason
        assert {o.status for save in saves[1:] for o in save} == {"done"}
    finally:
        rabbitmq_server.control("eval", "application:unset_env(rabbit, max_message_size).")
        await broker.stop()
        await storage.stop()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("heartbeat=5", "heartbeat='5' must be left out: lease=SECONDS sets it, to a third"),
        ("ssl_cert_reqs=none", "there is no option 'ssl_cert_reqs'.*cafile"),
        ("auth=kerberos", "auth='kerberos' must be one of"),
    ],
)
def test_an_option_that_does_not_exist_is_told(query: str, said: str) -> None:
    for half in (RabbitMQBackend().broker, RabbitMQBackend().storage):
        with pytest.raises(ConfigurationError, match=said) as caught:
            half(f"amqp://guest:hidden@localhost/?{query}")
        assert "hidden" not in str(caught.value)


async def test_of_two_servers_the_one_that_answers_is_used(
    rabbitmq_server: RabbitMQServer, namespace: str
) -> None:
    """A list of hosts is one of servers to try, in each of its parts."""
    host = rabbitmq_server.url.partition("@")[2].rstrip("/")
    broker = RabbitMQBroker(f"amqp://guest:guest@127.0.0.1:{free_port()},{host}/")
    try:
        await broker.start(namespace)
        subscription = await broker.subscribe({"q": 1})
        await broker.publish([message()])
        assert await collect(subscription, "q", 1)
    finally:
        await broker.stop()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that signs itself, with its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    key = path.with_name("key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", path],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + key.read_text())
    return path


@pytest.fixture
def tls_port(rabbitmq_server: RabbitMQServer, certificate: Path) -> Iterator[int]:
    """A TLS listener of the server, while the test runs."""
    files = rabbitmq_server.give(certificate)
    port = free_port()
    rabbitmq_server.control(
        "eval",
        f'rabbit_networking:start_ssl_listener({{"127.0.0.1", {port}, inet}}, '
        f'[{{certfile, "{files}"}}, {{keyfile, "{files}"}}], 2).',
    )
    yield port
    rabbitmq_server.control(
        "eval", f'rabbit_networking:stop_tcp_listener({{"127.0.0.1", {port}, inet}}).'
    )


async def test_tls_that_is_set_up_wrongly_is_told(
    rabbitmq_server: RabbitMQServer, tls_port: int, certificate: Path, namespace: str
) -> None:
    plain = rabbitmq_server.url.rpartition(":")[2].rstrip("/")
    tls = f"amqps://guest:guest@localhost:{tls_port}/"
    wrong = {
        tls: "certificate",
        f"{tls}?cafile=/nowhere.pem": "cafile=/nowhere.pem",
        f"{tls}?cafile={certificate}&certfile=/nowhere.pem": "certfile=/nowhere.pem",
        f"{tls}?cafile={__file__}": "cafile=",
        f"{tls}?cafile={certificate}&auth=external": "does not take this way to log in",
        f"amqps://guest:guest@localhost:{plain}/": "TLS",
        f"amqp://guest:guest@localhost:{tls_port}/": "amqps://",
    }
    for url, said in wrong.items():
        broker = RabbitMQBroker(url)
        with pytest.raises(ConfigurationError, match=said) as caught:
            await broker.start(namespace)
        assert "guest:guest" not in str(caught.value)
        await broker.stop()
    broker = RabbitMQBroker(f"{tls}?cafile={certificate}")
    await broker.start(namespace)
    await broker.stop()
