"""PostgreSQL with TLS, by a certificate that nobody knows yet."""

from __future__ import annotations

from tests.services.postgres import NativePostgres, PostgresServer
from tests.services.secured_kafka import Certificates
from tests.services.service import Way


class NativeSecuredPostgres(NativePostgres):
    """The server of `SecuredPostgres`, with certificates made for it."""

    def prepare(self) -> str:
        url = super().prepare()
        self.certificates = Certificates(self.directory)
        # The server refuses a key that others could read.
        self.write("server.pem", self.certificates.server.read_text()).chmod(0o600)
        return url

    def command(self) -> list[str]:
        here = self.directory / "server.pem"
        settings = {
            "listen_addresses": "127.0.0.1,127.0.0.2",
            "ssl": "on",
            "ssl_cert_file": str(here),
            "ssl_key_file": str(here),
        }
        return [*super().command(), *(p for k, v in settings.items() for p in ("-c", f"{k}={v}"))]


class SecuredPostgres(PostgresServer):
    """A server with TLS, never one of somebody else's."""

    def ways(self) -> tuple[Way, ...]:
        return (self.native(),)

    def native(self) -> NativeSecuredPostgres:
        self.made = NativeSecuredPostgres()
        return self.made
