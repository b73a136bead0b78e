"""What a `kafka://` URL says, as the driver's arguments."""

from __future__ import annotations

import ssl
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote

from qtasks_core.errors import ConfigurationError
from qtasks_core.urls import redact, split

REQUEST = 5.0
"""Seconds after which a server that does not answer counts as unreachable."""
PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_TLS = ("ssl_cafile", "ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_check_hostname")
OPTIONS = ("security_protocol", "sasl_mechanism", *_TLS, "client_id")
"""Beside those that `KafkaBackend` takes off the URL."""


def settings_of(url: str) -> dict[str, Any]:
    """Return the driver's arguments for `url`. Raises `ConfigurationError`."""
    try:
        return _settings_of(split(url))
    except _Wrong as error:
        raise ConfigurationError(f"{redact(url)}: {error}") from error.__cause__


class _Wrong(Exception):
    """What is wrong with a URL, which it does not show."""


def _settings_of(parts: SplitResult) -> dict[str, Any]:
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := options.keys() - set(OPTIONS):
        known = ", ".join(("lease", "partitions", "replicas", *OPTIONS))
        raise _Wrong(f"unknown options: {', '.join(sorted(unknown))}; there are {known}")
    tls = any(option in options for option in _TLS)
    guessed = ("SASL_" if user else "") + ("SSL" if tls else "PLAINTEXT")
    protocol = _one_of("security_protocol", options.get("security_protocol", guessed), PROTOCOLS)
    settings: dict[str, Any] = {
        "bootstrap_servers": hosts or "localhost:9092",
        "security_protocol": protocol,
    }
    if "client_id" in options:
        if not options["client_id"]:
            raise _Wrong("client_id is empty; leave it out")
        settings["client_id"] = options["client_id"]
    if protocol.endswith("SSL"):
        settings["ssl_context"] = _tls_context(options)
    elif tls:
        raise _Wrong("ssl_ options need security_protocol=SSL or SASL_SSL")
    if protocol.startswith("SASL"):
        if not user:
            raise _Wrong(f"{protocol} needs kafka://USER:PASSWORD@HOST:PORT")
        mechanism = options.get("sasl_mechanism", "PLAIN")
        settings["sasl_mechanism"] = _one_of("sasl_mechanism", mechanism, MECHANISMS)
        settings["sasl_plain_username"] = unquote(user)
        settings["sasl_plain_password"] = unquote(password)
    elif user or "sasl_mechanism" in options:
        raise _Wrong(f"a login needs security_protocol=SASL_{protocol}")
    return settings


def _one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise _Wrong(f"{option}={value} is none of {', '.join(known)}")
    return value


def _tls_context(options: dict[str, str]) -> ssl.SSLContext:
    """Return a context with the URL's files. Raises `_Wrong` for one of no use."""
    authority, certificate, key = (
        options.get(option) for option in ("ssl_cafile", "ssl_certfile", "ssl_keyfile")
    )
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError as error:
        raise _Wrong(f"ssl_cafile={authority!r}: {error}") from error
    if key is not None and certificate is None:
        raise _Wrong("ssl_keyfile needs ssl_certfile, the certificate of that key")
    if certificate is not None:
        try:
            # Without a password the library would ask for one at the terminal.
            context.load_cert_chain(certificate, key, options.get("ssl_password", ""))
        except OSError as error:
            raise _Wrong(
                f"ssl_certfile={certificate!r}, ssl_keyfile={key!r}: {error}; "
                "they must be a PEM certificate and its key, with ssl_password= if it has one"
            ) from error
    check = options.get("ssl_check_hostname", "true").lower()
    _one_of("ssl_check_hostname", check, ("true", "1", "yes", "false", "0", "no"))
    context.check_hostname = check in ("true", "1", "yes")
    return context
