"""Apache Kafka for the tests: one KRaft process, broker and controller."""

from __future__ import annotations

import base64
import os
import re
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.services.container import Contained
from tests.services.install import cache, need_program, one_at_a_time, run
from tests.services.native import Native, free_port
from tests.services.service import (
    NotInContainers,
    NotOurs,
    NotReady,
    Service,
    Unobtainable,
    Way,
)

if TYPE_CHECKING:
    from aiokafka.admin import AIOKafkaAdminClient
    from testcontainers.core.container import DockerContainer

VERSION = "4.3.1"

# slf4j-simple is the one logger that needs no configuration file: warnings go to the output.
POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>qtasks</groupId><artifactId>kafka-for-tests</artifactId><version>1</version><dependencies>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId>
<version>{VERSION}</version></dependency>
<dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId>
<version>1.7.36</version></dependency></dependencies></project>
"""

SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    # One broker, so one replica of everything.
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "4",
    # Short leases in tests, and no wait for members that do not come.
    "group.min.session.timeout.ms": "500",
    "group.initial.rebalance.delay.ms": "0",
    # A topic that is deleted is gone soon, not in a minute.
    "log.segment.delete.delay.ms": "1000",
    # A broker killed and started again is refused until its old session has ended.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
}
"""What the server is told wherever it runs; addresses and the directory are added."""


def jars() -> Path:
    """Return the directory of Kafka's jars, fetched with Maven when they are not there yet."""
    home = os.environ.get("KAFKA_HOME")
    if home:
        return Path(home) / "libs"
    lib = cache() / f"kafka-{VERSION}" / "lib"
    if lib.is_dir():
        return lib
    maven = need_program("mvn", "maven")
    with one_at_a_time("install"):
        if not lib.is_dir():
            lib.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=lib.parent) as work:
                (Path(work) / "pom.xml").write_text(POM)
                goal = ["dependency:copy-dependencies", "-DoutputDirectory=lib"]
                run([maven, "-q", "-B", *goal], dict(os.environ), Path(work))
                os.rename(Path(work) / "lib", lib)  # whole or not at all
    return lib


class NativeKafka(Native):
    """Kafka from Maven Central, or the one of KAFKA_HOME.

    A client is sent to the address that the server calls its own. So one port, `behind`, is for
    connections that come through a proxy: it sends clients to the port `proxied`.
    """

    behind: int
    proxied: int

    def find(self) -> None:
        self._java = need_program("java", "default-jre-headless")
        self._jars = jars()
        if not self.version:
            raise Unobtainable(f"no kafka_2.13-*.jar in {self._jars}")

    @property
    def version(self) -> str:
        """The version in the name of the server's jar; the protocol does not tell it."""
        names = " ".join(path.name for path in self._jars.glob("kafka_2.13-*.jar"))
        found = re.search(r"kafka_2\.13-([\d.]+)\.jar", names)
        return found[1] if found else ""

    def prepare(self) -> str:
        self.port, controller = free_port(), free_port()
        self.behind, self.proxied = free_port(), free_port()
        text = "".join(f"{key}={value}\n" for key, value in self.settings(controller).items())
        self._properties = str(self.write("server.properties", text))
        identity = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = ["kafka.tools.StorageTool", "format", f"--cluster-id={identity}"]
        self.run([*self._jvm(128), *tool, f"--config={self._properties}"])
        return f"kafka://127.0.0.1:{self.port}"

    def settings(self, controller: int) -> dict[str, str]:
        """Return the server's properties; `controller` is the port of its controller."""
        return {
            **SETTINGS,
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller},"
            f"PROXIED://127.0.0.1:{self.behind}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port},"
            f"PROXIED://127.0.0.1:{self.proxied}",
            "listener.security.protocol.map": SETTINGS["listener.security.protocol.map"]
            + ",PROXIED:PLAINTEXT",
            "log.dirs": str(self.directory / "data"),
        }

    def command(self) -> list[str]:
        return [*self._jvm(512), "kafka.Kafka", self._properties]

    def _jvm(self, megabytes: int) -> list[str]:
        logger = "org.slf4j.simpleLogger.defaultLogLevel"
        heap = f"-Xmx{megabytes}m"
        return [self._java, heap, f"-D{logger}=warn", "-cp", f"{self._jars}/*"]


class ContainedKafka(Contained):
    """Apache Kafka in a container; the class of testcontainers fits another vendor's image.

    The server calls itself by the address that it tells its clients, so inside it listens on the
    port that is published.
    """

    CONTROLLER = 9093

    def make(self, image: str) -> DockerContainer:
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy

        settings = {
            **SETTINGS,
            "controller.quorum.voters": f"1@127.0.0.1:{self.CONTROLLER}",
            "listeners": f"PLAINTEXT://0.0.0.0:{self.port},"
            f"CONTROLLER://127.0.0.1:{self.CONTROLLER}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port}",
            "log.dirs": "/var/lib/kafka/data",
        }
        variables = {f"KAFKA_{k.upper().replace('.', '_')}": v for k, v in settings.items()}
        java = os.environ.get("JDK_JAVA_OPTIONS", "")
        return (
            DockerContainer(image)
            .with_envs(**variables, KAFKA_HEAP_OPTS="-Xmx512m", JDK_JAVA_OPTIONS=java)
            .waiting_for(LogMessageWaitStrategy("Kafka Server started"))
        )

    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.port}"


class KafkaServer(Service):
    name = "kafka"

    def native(self) -> Way:
        return NativeKafka()

    def container(self) -> Way:
        return ContainedKafka(self.name)

    async def probe(self, url: str) -> str:
        async with asking(url) as admin:
            await admin.find_coordinator("ready")  # creates what groups need, waits for its leader
        return ""

    def proxied(self) -> tuple[int, int]:
        """Return the port that a proxy leads to, and the one where it must listen."""
        if isinstance(self._way, ContainedKafka):
            raise NotInContainers("the container has no port for a proxy")
        if not isinstance(self._way, NativeKafka):
            raise NotOurs("a server of others has no port for a proxy")
        return self._way.behind, self._way.proxied

    async def empty(self, url: str) -> None:
        """Delete the topics: a killed broker looks through each partition before it listens.

        With six hundred topics of eight partitions that took 37 s on a machine at rest.
        """
        async with asking(url) as admin:
            await admin.delete_topics(await topics_of_clients(admin))


@asynccontextmanager
async def asking(url: str) -> AsyncIterator[AIOKafkaAdminClient]:
    """Give a client for the topics. Raises `NotReady` when the server does not answer."""
    from aiokafka.admin import AIOKafkaAdminClient
    from aiokafka.errors import KafkaError

    servers = url.removeprefix("kafka://").partition("?")[0].rstrip("/")
    admin = AIOKafkaAdminClient(bootstrap_servers=servers, request_timeout_ms=5000)
    try:
        await admin.start()
        yield admin
    except (OSError, KafkaError) as error:
        raise NotReady(str(error)) from error
    finally:
        await admin.close()


async def topics_of_clients(admin: AIOKafkaAdminClient) -> list[str]:
    """Return the topics that are not the server's own."""
    return [topic for topic in await admin.list_topics() if not topic.startswith("__")]
