"""URLs that name a part: reading their options, and showing them without the password."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from qtasks_core.errors import ConfigurationError
from qtasks_core.options import Kind

SECRET_WORDS = ("pass", "secret", "token")


def redact(url: str) -> str:
    """Return `url` fit for a log: the password and secret-looking options are `***`."""
    if "://" not in url and ("@" in url or "=" in url):
        return "***"  # no URL, but perhaps the credentials of one
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    netloc = parts.netloc
    if ":" in netloc and "@" in parts.path + parts.query + parts.fragment:
        # A password with a bare / ? or # ends the authority early and would stand in the rest.
        return f"{parts.scheme}://***"
    if "@" in netloc:
        credentials, _, host = netloc.rpartition("@")
        user, colon, _ = credentials.partition(":")
        netloc = f"{user}{colon and ':***'}@{host}"
    query = urlencode(
        [
            (key, _shown(key, value))
            for key, value in parse_qsl(parts.query, keep_blank_values=True)
        ],
        safe="*/:,",
    )
    # urlunsplit drops the empty authority of sqlite:///file, so the text is put together by hand.
    scheme = f"{parts.scheme}:" if parts.scheme else ""
    slashes = "//" if "://" in url else ""
    return f"{scheme}{slashes}{netloc}{parts.path}{query and '?' + query}"


def _shown(key: str, value: str) -> str:
    """Return what may be shown of an option, which may be a URL itself."""
    if value and any(word in key.lower() for word in SECRET_WORDS):
        return "***"
    return redact(value) if "://" in value or "@" in value else value


def split(url: str) -> SplitResult:
    """Return the parts of a URL, of which the host may be several. Raises `ConfigurationError`.

    That says nothing of why the library refuses one: it may quote the password, a bare / or # in
    which makes what stands before it a port.
    """
    try:
        parts = urlsplit(url)
        for host in parts.netloc.rpartition("@")[2].split(","):
            if urlsplit(f"//{host}").port == 0:
                raise ValueError("drivers take port 0 for none")
    except ValueError:
        parts = None
    if parts is None or "://" not in url:
        raise ConfigurationError(
            f"{redact(url)} is not a URL like scheme://user:password@host:port, with a number "
            "from 1 to 65535 as port, and / ? # [ ] @ in the password written "
            "%2F %3F %23 %5B %5D %40"
        )
    return parts


def take_options(url: str, known: Mapping[str, Callable[[str], Any]]) -> tuple[str, dict[str, Any]]:
    """Split the options named in `known` off the query of `url`.

    Returns the URL without them and their values (absent options are left out). `known` has a
    `qtasks_core.options.Kind` for each option, or a type such as `float`. Raises
    `ConfigurationError` when a value is none of these, an option is given twice, or the URL is
    none. Options not in `known` stay in the URL, for the driver.
    """
    query = split(url).query
    taken: dict[str, Any] = {}
    left: list[tuple[str, str]] = []
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            left.append((key, value))
            continue
        if key in taken:
            raise ConfigurationError(f"{_place(url)}: {key} is given twice")
        kind = known[key]
        try:
            taken[key] = kind(value)
        except ValueError:
            allowed = kind.allowed if isinstance(kind, Kind) else f"a {kind.__name__}"
            raise ConfigurationError(
                f"{_place(url)}: {key}={_shown(key, value)!r} must be {allowed}"
            ) from None
    if not taken:
        return url, {}
    head = url.partition("?")[0]
    return head + ("?" + urlencode(left) if left else ""), taken


def refuse_options(url: str, known: Iterable[str]) -> None:
    """Raise `ConfigurationError` for options left in `url`; `known` are those that exist.

    For what no driver reads. A name is told, and no value, which may be a secret.
    """
    left = [key for key, _ in parse_qsl(split(url).query, keep_blank_values=True)]
    if left:
        place = _place(url)
        # Behind a bare ? in the password, the rest of it passes for the name of an option.
        name = "***" if place.endswith("://***") else repr(left[0])
        raise ConfigurationError(
            f"{place}: there is no option {name}; there are: {', '.join(known) or 'none'}"
        )


def _place(url: str) -> str:
    """Return `url` fit for a log, without its options."""
    # Redacted first: a bare ? in the password would leave half of it in front.
    return redact(url).partition("?")[0]
