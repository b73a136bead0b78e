"""URLs that name a part: reading their options, and showing them without the password."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from qtasks_core.errors import ConfigurationError


def redact(url: str) -> str:
    """Return `url` fit for a log: the password and secret-looking options are `***`."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    netloc = parts.netloc
    if "@" in netloc:
        credentials, _, host = netloc.rpartition("@")
        user, colon, _ = credentials.partition(":")
        netloc = f"{user}{colon and ':***'}@{host}"
    query = urlencode(
        [(k, "***" if "pass" in k.lower() or "secret" in k.lower() else v)
         for k, v in parse_qsl(parts.query, keep_blank_values=True)],
        safe="*/:,",
    )  # fmt: skip
    # urlunsplit drops the empty authority of sqlite:///file, so the text is put together by hand.
    _, _, rest = url.partition("://")
    slashes = "//" if rest or parts.netloc else ""
    return f"{parts.scheme}:{slashes}{netloc}{parts.path}{query and '?' + query}"


def take_options(url: str, known: Mapping[str, Callable[[str], Any]]) -> tuple[str, dict[str, Any]]:
    """Split the options named in `known` off the query of `url`.

    Returns the URL without them and their converted values (absent options are left out). Raises
    `ConfigurationError` when a value does not convert. Options not in `known` stay in the URL,
    for the driver.
    """
    parts = urlsplit(url)
    taken: dict[str, Any] = {}
    left: list[tuple[str, str]] = []
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key not in known:
            left.append((key, value))
            continue
        try:
            taken[key] = known[key](value)
        except ValueError as error:
            message = f"{key}={value!r} in {redact(url)} is not a {known[key].__name__}"
            raise ConfigurationError(message) from error
    head = url.partition("?")[0]
    return head + ("?" + urlencode(left) if left else ""), taken
