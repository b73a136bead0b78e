"""Kafka with TLS, logins and access control: what an operator runs.

Beside the plain listener, on which the tests may do everything, it has one that wants a client's
certificate and two that want a login. Who logs in may do what an ACL allows, and nothing else.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from qtasks.testing.native import free_port
from qtasks.testing.recipes import PASSWORD
from tests.services.kafka import KafkaServer, NativeKafka
from tests.services.service import Way

USER = "worker"
OTHER = "other"


class NativeSecuredKafka(NativeKafka):
    """The server of `SecuredKafka`, with certificates made for it."""

    def changed(self, settings: dict[str, str]) -> dict[str, str]:
        self.tls, self.login, self.tls_login = free_port(), free_port(), free_port()
        self.certificates = Certificates(self.directory)
        made = self.certificates
        ports = {"SSL": self.tls, "SASL_PLAINTEXT": self.login, "SASL_SSL": self.tls_login}
        more = "".join(f",{name}://127.0.0.1:{port}" for name, port in ports.items())
        module = "org.apache.kafka.common.security.plain.PlainLoginModule"
        users = " ".join(f'user_{user}="{PASSWORD}"' for user in (USER, OTHER))
        plain = f"{module} required {users};"
        return {
            **settings,
            "listeners": settings["listeners"] + more,
            "advertised.listeners": settings["advertised.listeners"] + more,
            "listener.security.protocol.map": settings["listener.security.protocol.map"]
            + "".join(f",{name}:{name}" for name in ports),
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(made.server),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(made.authority),
            "listener.name.ssl.ssl.client.auth": "required",
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl_plaintext.plain.sasl.jaas.config": plain,
            "listener.name.sasl_ssl.plain.sasl.jaas.config": plain,
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": f"User:ANONYMOUS;User:CN={Certificates.CLIENT}",
        }


class Certificates:
    """An authority with a certificate for the server and one for a client, as PEM files."""

    CLIENT = "client"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.authority = directory / "authority.pem"
        key = directory / "authority.key"
        self._openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-days", "2", "-subj", "/CN=authority", "-keyout", key, "-out", self.authority,
        )  # fmt: skip
        self.server = self._signed("localhost", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        self.client = self._signed(self.CLIENT, "extendedKeyUsage=clientAuth")
        self.client_certificate = directory / f"{self.CLIENT}.crt"
        self.client_key = directory / f"{self.CLIENT}.key"

    def _signed(self, name: str, extension: str) -> Path:
        """Return a file with a certificate that the authority signed, and its key."""
        key, request, certificate, extensions, both = (
            self._directory / f"{name}.{kind}" for kind in ("key", "csr", "crt", "ext", "pem")
        )
        extensions.write_text(extension)
        self._openssl(
            "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-subj", f"/CN={name}", "-keyout", key, "-out", request,
        )  # fmt: skip
        self._openssl(
            "x509", "-req", "-in", request, "-CA", self.authority,
            "-CAkey", self._directory / "authority.key", "-CAcreateserial", "-days", "2",
            "-extfile", extensions, "-out", certificate,
        )  # fmt: skip
        both.write_text(key.read_text() + certificate.read_text())
        return both

    def encrypt(self, key: Path, password: str) -> None:
        """Lock a key with a password."""
        self._openssl("ec", "-in", key, "-aes256", "-passout", f"pass:{password}", "-out", key)

    def _openssl(self, *argv: str | Path) -> None:
        subprocess.run(["openssl", *argv], check=True, capture_output=True)


class SecuredKafka(KafkaServer):
    """The server as a service; `way` knows its other ports and its certificates."""

    def ways(self) -> tuple[Way, ...]:
        # One in the environment would not have these listeners.
        return (self.native(),)

    def native(self) -> NativeSecuredKafka:
        self.way = NativeSecuredKafka()
        return self.way
