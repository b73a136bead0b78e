"""TLS that is set up right works, and each wrong set-up is told at start with what to set."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote, urlsplit

import pytest

from qtasks_core import TaskMessage
from qtasks_core.errors import ConfigurationError
from qtasks_postgres import PostgresBroker
from tests.services.secured_kafka import Certificates
from tests.services.secured_postgres import SecuredPostgres


@pytest.fixture(scope="module")
def secured() -> Iterator[SecuredPostgres]:
    server = SecuredPostgres()
    server.start()
    yield server
    server.stop()


def url_of(secured: SecuredPostgres, query: str, host: str = "127.0.0.1") -> str:
    authority = quote(str(secured.made.certificates.authority), safe="")
    parts = urlsplit(secured.url)
    netloc = f"{parts.username}:{parts.password}@{host}:{parts.port}"
    return parts._replace(netloc=netloc, query=query.format(authority=authority)).geturl()


@pytest.mark.parametrize(
    "query",
    ["sslmode=require", "sslmode=verify-full&sslrootcert={authority}", "sslmode=prefer", ""],
)
async def test_it_works(secured: SecuredPostgres, query: str) -> None:
    broker = PostgresBroker(url_of(secured, query))
    await broker.start("app")
    (outcome,) = await broker.publish([TaskMessage(uuid="one", task_name="tests:task")])
    assert outcome.status == "done"
    await broker.stop()


async def test_an_authority_that_did_not_sign_is_told(
    secured: SecuredPostgres, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Certificates(tmp_path_factory.mktemp("other"))
    url = url_of(secured, f"sslmode=verify-ca&sslrootcert={quote(str(other.authority), safe='')}")
    with pytest.raises(ConfigurationError, match="sslrootcert=FILE") as told:
        await PostgresBroker(url).start("app")
    assert str(urlsplit(secured.url).password) not in str(told.value)
    assert "\n" not in str(told.value)


async def test_a_certificate_of_another_host_is_told(secured: SecuredPostgres) -> None:
    url = url_of(secured, "sslmode=verify-full&sslrootcert={authority}", host="127.0.0.2")
    with pytest.raises(ConfigurationError, match=r"the host in the URL|127\.0\.0\.2"):
        await PostgresBroker(url).start("app")


async def test_a_key_that_does_not_fit_is_told(secured: SecuredPostgres) -> None:
    made = secured.made.certificates
    wrong = quote(str(made.server), safe="")
    certificate = quote(str(made.client_certificate), safe="")
    url = url_of(secured, f"sslmode=require&sslcert={certificate}&sslkey={wrong}")
    with pytest.raises(ConfigurationError, match="sslkey"):
        await PostgresBroker(url).start("app")
