"""Finds out why a cluster is unusable. The driver takes a wrong configuration for an outage."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

from qtasks_core.errors import ConfigurationError, chain_of

LOOK = 2.0
"""Seconds for each check of a server."""


def wrong_tls(error: BaseException) -> str | None:
    """Return what is wrong with the TLS settings, or None if TLS is not the cause of the error."""
    cause = next((each for each in chain_of(error) if isinstance(each, ssl.SSLError)), None)
    if cause is None:
        return None
    reason = cause.reason or ""
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({cause.verify_message}): "
            "set ssl_cafile= to the file of the authority that signed it"
        )
    if "ALERT" in reason and any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA")):
        return (
            f"it does not accept this client's certificate ({reason}): "
            "set ssl_certfile= and ssl_keyfile="
        )
    # Any other error may come from a broken connection.
    return None


async def diagnose(settings: dict[str, Any], shown: str) -> None:
    """Raise `ConfigurationError` if a server answers but speaks another protocol.

    If a server refuses us, raise the driver's error, because the driver only logs it while it tries
    the servers. Return if nothing was found out.
    """
    from aiokafka.conn import collect_hosts

    settings = dict(settings)
    for host, port, _ in collect_hosts(settings.pop("bootstrap_servers")):
        try:
            await _look(host, port, settings)
        except (OSError, asyncio.IncompleteReadError) as error:
            said = wrong_tls(error)
            if said is None:
                tls = settings["security_protocol"].endswith("SSL")
                said = await (_speaks_plainly if tls else _speaks_tls)(host, port)
            if said is not None:
                raise ConfigurationError(f"Kafka at {shown}: {said}") from error


async def _look(host: str, port: int, settings: dict[str, Any]) -> None:
    """Connect, log in and ask for the cluster, as the driver does."""
    from aiokafka.conn import create_conn
    from aiokafka.errors import KafkaConnectionError, KafkaError
    from aiokafka.protocol.admin import SaslHandShakeRequest
    from aiokafka.protocol.metadata import MetadataRequest

    try:
        async with asyncio.timeout(LOOK):
            connection = await create_conn(host, port, **settings)
            try:
                await connection.send(MetadataRequest([]))
            finally:
                connection.close()
    except KafkaConnectionError as error:
        if settings["security_protocol"].startswith("SASL"):
            raise ConnectionError(str(error)) from error
        try:
            async with asyncio.timeout(LOOK):
                connection = await create_conn(host, port, **settings)
                try:
                    answer = await connection.send(SaslHandShakeRequest("PLAIN"))
                finally:
                    connection.close()
        except (KafkaError, OSError):
            raise ConnectionError(str(error)) from error
        offered = ", ".join(answer.enabled_mechanisms)
        if not offered:
            raise ConnectionError(str(error)) from error
        raise ConfigurationError(
            f"Kafka at {host}:{port} wants a login ({offered}): "
            "kafka://USER:PASSWORD@HOST:PORT?sasl_mechanism=..."
        ) from error


async def _speaks_plainly(host: str, port: int) -> str | None:
    """Return advice if a server answers without TLS, else None."""
    from aiokafka.conn import create_conn
    from aiokafka.errors import KafkaError

    try:
        async with asyncio.timeout(LOOK):
            connection = await create_conn(host, port)
    except (KafkaError, OSError):
        return None
    connection.close()
    return "this listener does not speak TLS: leave out security_protocol and the ssl_ options"


async def _speaks_tls(host: str, port: int) -> str | None:
    """Return advice if a server answers with TLS, else None."""
    # No data is sent over it, so the certificate does not matter.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(LOOK):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except OSError:
        return None
    writer.transport.abort()
    return "this listener speaks TLS: set security_protocol=SSL, or SASL_SSL with a login"
