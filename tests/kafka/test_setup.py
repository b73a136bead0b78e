"""A wrong set-up is told at the start, in one line that says what to set; it is no outage."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtasks.testing.recipes import PASSWORD
from qtasks_core.errors import ConfigurationError
from qtasks_kafka import KafkaBackend, KafkaStorage
from tests.services.secured_kafka import OTHER, USER, Certificates, SecuredKafka


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of an authority that nobody here trusts."""
    return Certificates(tmp_path_factory.mktemp("strangers"))


async def refused(url: str) -> str:
    """Return what `start` says to a URL that cannot work."""
    storage = KafkaStorage(url)
    with pytest.raises(ConfigurationError) as caught:
        await storage.start("setup")
    told = str(caught.value)
    assert PASSWORD not in told
    assert "\n" not in told
    return told


async def test_tls_where_it_is_wanted(secured: SecuredKafka) -> None:
    made = secured.way.certificates
    url = f"kafka://127.0.0.1:{secured.way.tls}"
    trusting = f"{url}?ssl_cafile={made.authority}"
    assert "security_protocol=SSL" in await refused(url)
    assert "ssl_cafile=" in await refused(f"{url}?security_protocol=SSL")
    assert "ssl_certfile=" in await refused(trusting)
    own = f"{trusting}&ssl_certfile={made.client_certificate}&ssl_keyfile={made.client_key}"
    storage = KafkaStorage(f"{own}&client_id=shop")
    await storage.start("setup")
    await storage.stop()


async def test_certificates_of_strangers(secured: SecuredKafka, strangers: Certificates) -> None:
    made, way = secured.way.certificates, secured.way
    url = f"kafka://127.0.0.1:{way.tls}?ssl_cafile="
    assert "is not trusted" in await refused(f"{url}{strangers.authority}")
    theirs = f"ssl_certfile={strangers.client_certificate}&ssl_keyfile={strangers.client_key}"
    assert "this client's certificate" in await refused(f"{url}{made.authority}&{theirs}")


async def test_tls_where_there_is_none(secured: SecuredKafka) -> None:
    authority = secured.way.certificates.authority
    told = await refused(f"{secured.url}?ssl_cafile={authority}")
    assert "does not speak TLS" in told


async def test_logins(secured: SecuredKafka) -> None:
    way = secured.way
    assert "wants a login (PLAIN)" in await refused(f"kafka://127.0.0.1:{way.login}")
    login = f"127.0.0.1:{way.login}"
    assert "Invalid username or password" in await refused(f"kafka://{USER}:wrong@{login}")
    scram = f"kafka://{USER}:{PASSWORD}@{login}?sasl_mechanism=SCRAM-SHA-256"
    assert "UnsupportedSaslMechanism" in await refused(scram)
    plain = secured.url.replace("//", f"//{USER}:{PASSWORD}@")
    assert "takes no login" in await refused(plain)
    tls = f"kafka://{USER}:{PASSWORD}@127.0.0.1:{way.tls_login}"
    assert "speaks TLS" in await refused(tls)


async def test_rights_that_are_missing_are_named(secured: SecuredKafka) -> None:
    told = await refused(f"kafka://{OTHER}:{PASSWORD}@127.0.0.1:{secured.way.login}")
    assert "setup.records" in told
    assert all(right in told for right in ("DESCRIBE", "READ", "WRITE", "CREATE"))


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "kafka://h?foo=1",
            "no option 'foo'; there are: lease, partitions, replicas, retention, directory, sec",
        ),
        ("kafka://h?security_protocol=TLS", "SASL_SSL"),
        ("kafka://u:hunter2@h?sasl_mechanism=DIGEST", "SCRAM-SHA-512"),
        ("kafka://u:hunter2@h?security_protocol=SSL", "SASL_SSL"),
        ("kafka://h?security_protocol=SASL_PLAINTEXT", "USER:PASSWORD"),
        ("kafka://h?security_protocol=PLAINTEXT&ssl_cafile=/x", "security_protocol"),
        ("kafka://h?ssl_cafile=/none", "ssl_cafile='/none'"),
        ("kafka://h?ssl_keyfile=/none", "ssl_certfile"),
        ("kafka://h?ssl_certfile=/none", "ssl_certfile='/none'"),
    ],
)
def test_options_that_cannot_be_are_answered_where_they_are_given(url: str, told: str) -> None:
    for resolve in (KafkaBackend().broker, KafkaBackend().storage):
        with pytest.raises(ConfigurationError) as caught:
            resolve(url)
        assert told in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_a_key_with_a_password_never_asks_at_the_terminal(tmp_path: Path) -> None:
    made = Certificates(tmp_path)
    made.encrypt(made.client_key, "hunter2")
    files = f"ssl_certfile={made.client_certificate}&ssl_keyfile={made.client_key}"
    with pytest.raises(ConfigurationError, match="ssl_password="):
        KafkaBackend().storage(f"kafka://h?{files}")
    KafkaBackend().storage(f"kafka://h?{files}&ssl_password=hunter2")
