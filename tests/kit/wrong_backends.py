"""Backends whose URLs are wrong on purpose, and the honest one, each named for what it does.

Their server is a port that somebody listens at, and what it keeps is a memory of each URL's path.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from urllib.parse import urlsplit

from qtasks_core import Backend, Broker, Guarantees, Storage
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.urls import redact, refuse_options, take_options
from qtasks_memory import MemoryBroker, MemoryStorage

OPTIONS = {"lease": float, "retention": float}


async def knock(url: str) -> None:
    """See that somebody listens. Raises `Unavailable`."""
    parts = urlsplit(url)
    try:
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError as error:
        raise Unavailable(f"{redact(url)}: {error}") from error
    writer.close()


class KnockingBroker(MemoryBroker):
    def __init__(self, url: str, *, lease: float = 30.0) -> None:
        super().__init__(urlsplit(url).path, lease=lease)
        self._url = url

    async def start(self, namespace: str) -> None:
        await knock(self._url)
        await super().start(namespace)


class KnockingStorage(MemoryStorage):
    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(urlsplit(url).path, **options)
        self._url = url

    async def start(self, namespace: str) -> None:
        await knock(self._url)
        await super().start(namespace)


class Honest(Backend):
    """Answers for `kit://HOST:PORT/NAME?lease=SECONDS&retention=SECONDS`."""

    contract = 1

    def broker(self, url: str) -> Broker:
        rest, options = self._parsed(url)
        options.pop("retention", None)
        return KnockingBroker(rest, **options)

    def storage(self, url: str) -> Storage:
        rest, options = self._parsed(url)
        options.pop("lease", None)
        return KnockingStorage(rest, **options)

    def _parsed(self, url: str) -> tuple[str, dict[str, Any]]:
        rest, options = take_options(url, OPTIONS)
        refuse_options(rest, OPTIONS)
        return rest, options


class StoresInOnePlace(Honest):
    """Its storage ignores the URL."""

    def storage(self, url: str) -> Storage:
        return MemoryStorage("the only one")


class PublishesInOnePlace(Honest):
    """Its broker ignores the URL."""

    def broker(self, url: str) -> Broker:
        return MemoryBroker("the only one")


class StoresForItself(Honest):
    """Each storage is a place of its own, although the URL is the same."""

    count = 0

    def storage(self, url: str) -> Storage:
        StoresForItself.count += 1
        return MemoryStorage(f"number {StoresForItself.count}")


class IsOfAnotherVersion(Honest):
    contract = 0


class SwapsItsHalves(Honest):
    def broker(self, url: str) -> Any:
        return super().storage(url)


class TakesAnyOption(Honest):
    """What it does not know it overlooks."""

    def _parsed(self, url: str) -> tuple[str, dict[str, Any]]:
        rest, options = take_options(url, OPTIONS)
        return rest.partition("?")[0], options


class ListsNoOptions(Honest):
    def _parsed(self, url: str) -> tuple[str, dict[str, Any]]:
        try:
            return super()._parsed(url)
        except ConfigurationError as error:
            raise ConfigurationError(str(error).partition(";")[0]) from None


class ShowsThePassword(Honest):
    """The URL is in its error as it was given."""

    def _parsed(self, url: str) -> tuple[str, dict[str, Any]]:
        try:
            return super()._parsed(url)
        except ConfigurationError as error:
            raise ConfigurationError(f"{url} is wrong") from error


class DeclaresThePassword(Honest):
    """The guarantees name the server by its whole URL."""

    def storage(self, url: str) -> Storage:
        class Declaring(KnockingStorage):
            @property
            def guarantees(self) -> Guarantees:
                return Guarantees(part=url, survives="nothing", durability="none")

        rest, _ = self._parsed(url)
        return Declaring(rest)


class LogsThePassword(Honest):
    """It logs what it is going to do."""

    def broker(self, url: str) -> Broker:
        logging.getLogger(__name__).debug("connecting to %s", url)
        return super().broker(url)
