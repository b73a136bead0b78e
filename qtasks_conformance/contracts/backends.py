"""A backend is found by its URL, uses the whole URL, and never shows its password."""

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
from qtasks_conformance.contracts.pairs import completion
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
    """The backend that is registered for the scheme of the subject's URL. Needs `url=`."""

    async def test_the_backend_is_found(self, subject: Subject) -> None:
        """The entry point names a backend with a supported contract version."""
        url = url_of(subject)
        backend = find_backend(url)
        assert isinstance(backend.broker(url), Broker), "`broker(url)` does not return a Broker"
        assert isinstance(backend.storage(url), Storage), "`storage(url)` does not return a Storage"

    async def test_both_halves_work_together(self, rig: Rig) -> None:
        """Instances of one URL work together: a task goes from a client to a worker and back."""
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
        ends = [completion(delivery, "ack", "success")]
        assert_settled(await composition.complete(subscription, ends), worker.guarantees)
        (task,) = await mine.get([message.uuid])
        assert task is not None, "a record of one instance is not seen by another of the same URL"
        assert task.status == "success"

    async def test_brokers_of_other_urls_share_nothing(self, rig: Rig) -> None:
        """A broker of one URL does not receive messages that were published at another URL."""
        urls = url_of(rig.subject), other_url_of(rig.subject)
        brokers = [await started_broker(rig, url) for url in urls]
        messages = rig.messages(len(brokers))
        for broker, message in zip(brokers, messages, strict=True):
            assert_done(await broker.publish([message]))
        for broker, message in zip(brokers, messages, strict=True):
            subscription = await broker.subscribe({"q": 10})
            (delivery,) = await collect(subscription, 1)
            assert delivery.message == message, "a message of another URL was delivered"
            await assert_silent(subscription, 0.3)

    async def test_storages_of_other_urls_share_nothing(self, rig: Rig) -> None:
        """A storage of one URL does not read records that were saved at another URL."""
        urls = url_of(rig.subject), other_url_of(rig.subject)
        storages = [await started_storage(rig, url) for url in urls]
        uuid = new_uuid()
        for storage in storages:
            assert await storage.get([uuid]) == [None], "a record of another URL was read"
            record = rig.record("success", uuid=uuid)
            assert_done(await storage.save([record]))
            assert await storage.get([uuid]) == [record]

    @pytest.mark.parametrize("half", HALVES)
    async def test_a_url_that_leads_nowhere_is_told(self, rig: Rig, half: Half) -> None:
        """If nobody listens at the URL, `start` raises `Unavailable` or `ConfigurationError`.

        It must not hang, and not use another server.
        """
        with nowhere(url_of(rig.subject)) as url, pytest.raises((Unavailable, ConfigurationError)):
            await started(rig, half, url)

    @pytest.mark.parametrize("half", HALVES)
    async def test_an_option_that_does_not_exist_is_refused(self, rig: Rig, half: Half) -> None:
        """An unknown option raises `ConfigurationError`, at the latest in `start`.

        The message names the option and lists those that exist.
        """
        with pytest.raises(ConfigurationError) as caught:
            await started(rig, half, with_option(url_of(rig.subject)))
        words = re.findall(r"\w+", str(caught.value))
        assert "colour" in words, f"the error does not name the option: {caught.value}"
        missing = [option for option in rig.subject.options if option not in words]
        assert not missing, f"the error does not list the options {missing}: {caught.value}"

    @pytest.mark.parametrize("half", HALVES)
    async def test_a_password_is_not_shown(
        self, rig: Rig, half: Half, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The password of a URL is in no error or its causes, no repr, guarantees or log record."""
        caplog.set_level(logging.DEBUG)
        secret = f"secret{new_uuid()}"
        with login_to_nowhere(url_of(rig.subject), secret) as url:
            shown = [await shown_text(rig, half, tried) for tried in (url, with_option(url))]
        written = logging.Formatter()
        shown += [written.format(record) + repr(record.args) for record in caplog.records]
        leaks = [text.replace(secret, "(the password)") for text in shown if secret in text]
        assert not leaks, f"the password of the URL is shown, use `redact`: {leaks}"


def url_of(subject: Subject) -> str:
    """Return the subject's URL. Skip the test if it has none."""
    if subject.url is None:
        pytest.skip("the subject has no `url`")
    return subject.url


def other_url_of(subject: Subject) -> str:
    """Return the subject's URL of another place. Skip the test if it has none."""
    if subject.other_url is None:
        pytest.skip("the subject has no `other_url`")
    return subject.other_url


async def started_broker(rig: Rig, url: str) -> Broker:
    """Start a broker for a URL."""
    return await rig.started(find_backend(url).broker(url))


async def started_storage(rig: Rig, url: str) -> Storage:
    """Start a storage for a URL."""
    return await rig.started(find_backend(url).storage(url))


async def started(rig: Rig, half: Half, url: str) -> Broker | Storage:
    """Start the broker or the storage of a URL; fail if `start` hangs."""
    start = started_broker if half == "broker" else started_storage
    return await limited(start(rig, url), PATIENCE, f"starting the {half}")


async def shown_text(rig: Rig, half: Half, url: str) -> str:
    """Return all text that the broker or the storage of a URL shows, with its errors."""
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
    """Split a URL into its scheme with `://`, the user and hosts, and the rest."""
    scheme, _, rest = url.partition("://")
    netloc = re.split("[/?]", rest, maxsplit=1)[0]
    return f"{scheme}://", netloc, rest[len(netloc) :]


def has_port(url: str) -> bool:
    """Tell whether a URL has a host with a port."""
    return re.search(r":\d+$", netloc_of(url)[1]) is not None


@contextmanager
def nowhere(url: str) -> Iterator[str]:
    """Yield the URL with a port of this machine where nobody listens during the block."""
    if not has_port(url):
        pytest.skip("the URL has no port")
    scheme, netloc, rest = netloc_of(url)
    login, at, _ = netloc.rpartition("@")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, so that no other program can listen there
        yield f"{scheme}{login}{at}127.0.0.1:{taken.getsockname()[1]}{rest}"


@contextmanager
def login_to_nowhere(url: str, password: str) -> Iterator[str]:
    """Yield the URL with a user and a password. If it has a port, nobody listens there."""
    scheme, netloc, rest = netloc_of(url)
    hosts = netloc.rpartition("@")[2]
    url = f"{scheme}user:{password}@{hosts}{rest}"
    if not has_port(url):
        yield url
        return
    with nowhere(url) as leading_nowhere:
        yield leading_nowhere
