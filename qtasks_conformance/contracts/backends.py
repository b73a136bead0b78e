"""A backend is found by its URL, uses all of the URL, and shows no password of it."""

from __future__ import annotations

import logging
import re
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest

from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done, assert_settled
from qtasks_conformance.contracts.pairs import end
from qtasks_conformance.rig import Rig, new_uuid
from qtasks_conformance.subject import Subject
from qtasks_conformance.waiting import PATIENCE, assert_silent, collect, limited
from qtasks_core import Broker, Storage
from qtasks_core.errors import ConfigurationError, QTasksError, Unavailable
from qtasks_core.lookup import find_backend
from qtasks_core.separate import compose

Half = Literal["broker", "storage"]
HALVES: tuple[Half, ...] = ("broker", "storage")


class BackendContract(Contract):
    """What is registered for the scheme of the subject's URL."""

    async def test_the_backend_is_found(self, subject: Subject) -> None:
        """By its entry point, for a version of the contracts that this release takes."""
        url = url_of(subject)
        backend = find_backend(url)
        assert isinstance(backend.broker(url), Broker), "broker(url) is no Broker"
        assert isinstance(backend.storage(url), Storage), "storage(url) is no Storage"

    async def test_both_halves_work_together(self, rig: Rig) -> None:
        """Of one URL, in several instances: a task goes from a client to a worker and back."""
        url = url_of(rig.subject)
        client, worker = await started_broker(rig, url), await started_broker(rig, url)
        mine, others = await started_storage(rig, url), await started_storage(rig, url)
        message = rig.message()
        assert_done(await compose(client, mine).submit([message]))
        subscription = await worker.subscribe({"q": 1})
        (delivery,) = await collect(subscription, 1)
        assert delivery.message == message
        composition = compose(worker, others)
        ((verdict, _),) = await composition.admit([delivery])
        assert verdict == "run"
        ends = [end(delivery, "ack", "success")]
        assert_settled(await composition.complete(subscription, ends), worker.guarantees)
        (task,) = await mine.get([message.uuid])
        assert task is not None, "what one instance has saved, another of the same URL does not see"
        assert task.status == "success"

    async def test_brokers_of_other_urls_share_nothing(self, rig: Rig) -> None:
        """Each receives what was published by its own URL, and nothing else."""
        urls = url_of(rig.subject), other_url_of(rig.subject)
        brokers = [await started_broker(rig, url) for url in urls]
        messages = rig.messages(len(brokers))
        for broker, message in zip(brokers, messages, strict=True):
            assert_done(await broker.publish([message]))
        for broker, message in zip(brokers, messages, strict=True):
            subscription = await broker.subscribe({"q": 10})
            (delivery,) = await collect(subscription, 1)
            assert delivery.message == message, "it came from the other URL"
            await assert_silent(subscription, 0.3)

    async def test_storages_of_other_urls_share_nothing(self, rig: Rig) -> None:
        """A record that is saved by one URL is not read by the other."""
        urls = url_of(rig.subject), other_url_of(rig.subject)
        storages = [await started_storage(rig, url) for url in urls]
        uuid = new_uuid()
        for storage in storages:
            assert await storage.get([uuid]) == [None], "it was saved by the other URL"
            record = rig.record("success", uuid=uuid)
            assert_done(await storage.save([record]))
            assert await storage.get([uuid]) == [record]

    @pytest.mark.parametrize("half", HALVES)
    async def test_a_url_that_leads_nowhere_is_told(self, rig: Rig, half: Half) -> None:
        """`start` raises: it does not work with some other server, and it does not hang."""
        with nowhere(url_of(rig.subject)) as url, pytest.raises((Unavailable, ConfigurationError)):
            await started(rig, half, url)

    @pytest.mark.parametrize("half", HALVES)
    async def test_an_option_that_does_not_exist_is_refused(self, rig: Rig, half: Half) -> None:
        """By its name, with those that exist: when the part is built, or when it starts."""
        with pytest.raises(ConfigurationError) as caught:
            await started(rig, half, with_option(url_of(rig.subject)))
        words = re.findall(r"\w+", str(caught.value))
        assert "colour" in words, f"the option is not named: {caught.value}"
        missing = [option for option in rig.subject.options if option not in words]
        assert not missing, f"{missing} are not among the options that exist: {caught.value}"

    @pytest.mark.parametrize("half", HALVES)
    async def test_a_password_is_not_shown(
        self, rig: Rig, half: Half, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Neither in an error or what caused it, nor in a repr, the guarantees or a log record."""
        caplog.set_level(logging.DEBUG)
        secret = f"secret{new_uuid()}"
        with login_to_nowhere(url_of(rig.subject), secret) as url:
            shown = [await told(rig, half, tried) for tried in (url, with_option(url))]
        written = logging.Formatter()
        shown += [written.format(record) + repr(record.args) for record in caplog.records]
        leaks = [text.replace(secret, "(the password)") for text in shown if secret in text]
        assert not leaks, leaks


def url_of(subject: Subject) -> str:
    """Return the subject's URL; the test is skipped where it says none."""
    if subject.url is None:
        pytest.skip("the subject says no URL")
    return subject.url


def other_url_of(subject: Subject) -> str:
    """Return a URL that leads elsewhere; the test is skipped where the subject says none."""
    if subject.other_url is None:
        pytest.skip("the subject says no other URL")
    return subject.other_url


async def started_broker(rig: Rig, url: str) -> Broker:
    """Start a broker of a URL."""
    return await rig.started(find_backend(url).broker(url))


async def started_storage(rig: Rig, url: str) -> Storage:
    """Start a storage of a URL."""
    return await rig.started(find_backend(url).storage(url))


async def started(rig: Rig, half: Half, url: str) -> Broker | Storage:
    """Start one half of a URL; fails when that neither works nor raises."""
    start = started_broker if half == "broker" else started_storage
    return await limited(start(rig, url), PATIENCE, f"starting the {half}")


async def told(rig: Rig, half: Half, url: str) -> str:
    """Return all that can be read of one half of a URL, and of what it raises."""
    texts: list[str] = []
    try:
        backend = find_backend(url)
        part = backend.broker(url) if half == "broker" else backend.storage(url)
        texts += [repr(backend), repr(part), str(part), repr(part.guarantees)]
        await limited(rig.started(part), PATIENCE, f"starting the {half}")
        texts += [repr(part), str(part), repr(part.guarantees)]
    except QTasksError as error:
        texts += [repr(error), *traceback.format_exception(error)]
    return "\n".join(texts)


def with_option(url: str) -> str:
    """Return a URL with an option that no backend has."""
    return f"{url}{'&' if '?' in url else '?'}colour=blue"


def netloc_of(url: str) -> tuple[str, str, str]:
    """Return what stands before the user and the hosts of a URL, these, and the rest."""
    scheme, _, rest = url.partition("://")
    netloc = re.split("[/?]", rest, maxsplit=1)[0]
    return f"{scheme}://", netloc, rest[len(netloc) :]


def has_port(url: str) -> bool:
    """Tell whether a URL names a server by its host and port."""
    return re.search(r":\d+$", netloc_of(url)[1]) is not None


@contextmanager
def nowhere(url: str) -> Iterator[str]:
    """Give the URL with a port of this machine at which nobody listens, and none will."""
    if not has_port(url):
        pytest.skip("the URL names no port of a server")
    scheme, netloc, rest = netloc_of(url)
    login, at, _ = netloc.rpartition("@")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        yield f"{scheme}{login}{at}127.0.0.1:{taken.getsockname()[1]}{rest}"


@contextmanager
def login_to_nowhere(url: str, password: str) -> Iterator[str]:
    """Give the URL with a user and a password; to nowhere, if it names a server."""
    scheme, netloc, rest = netloc_of(url)
    hosts = netloc.rpartition("@")[2]
    url = f"{scheme}user:{password}@{hosts}{rest}"
    if not has_port(url):
        yield url
        return
    with nowhere(url) as leading_nowhere:
        yield leading_nowhere
