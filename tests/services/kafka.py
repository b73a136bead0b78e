"""Apache Kafka for the tests: one KRaft process, broker and controller."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qtasks.testing.errors import NotReady
from qtasks.testing.native import GuardedProcess, free_port
from qtasks.testing.recipes import Kafka
from tests.services.container import Contained
from tests.services.install import cache, need_program, one_at_a_time, run
from tests.services.native import ByRecipe
from tests.services.service import NotInContainers, NotOurs, Service, Way

if TYPE_CHECKING:
    from aiokafka.admin import AIOKafkaAdminClient

VERSION = Kafka.image.rpartition(":")[2]

# slf4j-simple is the one logger that needs no configuration file: warnings go to the output.
POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>qtasks</groupId><artifactId>kafka-for-tests</artifactId><version>1</version><dependencies>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId>
<version>{VERSION}</version></dependency>
<dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId>
<version>1.7.36</version></dependency></dependencies></project>
"""


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


class KafkaOfTests(Kafka):
    """Kafka from Maven Central, or the one of KAFKA_HOME, with short timeouts and few partitions.

    `changed` may add to the settings of the server's own program.
    """

    settings: ClassVar[Mapping[str, str]] = {
        **Kafka.settings,
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.num.partitions": "4",
        # Short leases in tests.
        "group.min.session.timeout.ms": "500",
        "group.share.min.record.lock.duration.ms": "1000",
        # A topic that is deleted is gone soon, not in a minute.
        "log.segment.delete.delay.ms": "1000",
        # A broker killed and started again is refused until its old session has ended.
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
    }
    jvm = (*Kafka.jvm, "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")

    def __init__(self, changed: Callable[[dict[str, str]], dict[str, str]] | None = None) -> None:
        self._changed = changed

    def native_settings(self, process: GuardedProcess, port: int) -> dict[str, str]:
        settings = super().native_settings(process, port)
        return settings if self._changed is None else self._changed(settings)

    def libraries(self) -> Path:
        return jars()


class NativeKafka(ByRecipe):
    """Kafka from Maven Central, or the one of KAFKA_HOME.

    A client is sent to the address that the server calls its own. So one port, `behind`, is for
    connections that come through a proxy: it sends clients to the port `proxied`.
    """

    behind: int
    proxied: int

    def __init__(self) -> None:
        super().__init__()
        self.recipe = KafkaOfTests(self.changed)

    def changed(self, settings: dict[str, str]) -> dict[str, str]:
        """Return the server's properties. A subclass adds others instead."""
        self.behind, self.proxied = free_port(), free_port()
        added = {
            "listeners": f"PROXIED://127.0.0.1:{self.behind}",
            "advertised.listeners": f"PROXIED://127.0.0.1:{self.proxied}",
            "listener.security.protocol.map": "PROXIED:PLAINTEXT",
        }
        return settings | {key: f"{settings[key]},{more}" for key, more in added.items()}

    @property
    def version(self) -> str:
        """The version in the name of the server's jar; the protocol does not tell it."""
        names = " ".join(path.name for path in jars().glob("kafka_2.13-*.jar"))
        found = re.search(r"kafka_2\.13-([\d.]+)\.jar", names)
        return found[1] if found else ""


class KafkaServer(Service):
    name = "kafka"

    def native(self) -> Way:
        return NativeKafka()

    def container(self) -> Way:
        return Contained(KafkaOfTests(), JDK_JAVA_OPTIONS=os.environ.get("JDK_JAVA_OPTIONS", ""))

    async def probe(self, url: str) -> str:
        async with asking(url) as admin:
            await admin.find_coordinator("ready")  # creates what groups need, waits for its leader
        return ""

    def proxied(self) -> tuple[int, int]:
        """Return the port that a proxy leads to, and the one where it must listen."""
        if isinstance(self._way, Contained):
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
