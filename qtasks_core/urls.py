"""URLs of brokers and storages: reading their options, and showing them without the password."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from qtasks_core.errors import ConfigurationError
from qtasks_core.options import Kind

SECRET_WORDS = ("pass", "secret", "token")


def redact(url: str) -> str:
    """Return `url` in a form that is safe to log.

    The password, and options that look like secrets, are replaced with `***`.
    """
    if "://" not in url and ("@" in url or "=" in url):
        return "***"  # not a URL, but it may contain the credentials of one
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    netloc = parts.netloc
    if ":" in netloc and "@" in parts.path + parts.query + parts.fragment:
        # A bare / ? or # in the password ends the authority early. The rest of the password would
        # then be shown.
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
    # urlunsplit drops the empty authority of sqlite:///file, so build the text by hand.
    scheme = f"{parts.scheme}:" if parts.scheme else ""
    slashes = "//" if "://" in url else ""
    return f"{scheme}{slashes}{netloc}{parts.path}{query and '?' + query}"


def _shown(key: str, value: str) -> str:
    """Return the value of an option as it may be shown. It may be a URL itself."""
    if value and any(word in key.lower() for word in SECRET_WORDS):
        return "***"
    return redact(value) if "://" in value or "@" in value else value


def split(url: str) -> SplitResult:
    """Return the pieces of a URL. It may have several hosts. Raises `ConfigurationError`.

    The error does not repeat the reason of the library, which may quote the password. With a bare /
    or # in the password, the text before it is taken for a port.
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
    """Remove the options named in `known` from the query of `url`.

    Returns the URL without them, and their values. Absent options are left out. `known` has a
    `qtasks_core.options.Kind` for each option, or a type such as `float`. Raises
    `ConfigurationError` if a value does not fit, an option is given twice, or the URL is invalid.
    Options that are not in `known` stay in the URL, for the driver.
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
    """Raise `ConfigurationError` for options that are left in `url`. `known` are the existing ones.

    For URLs whose remaining options no driver reads. The error has the name of an option, not its
    value, which may be a secret.
    """
    left = [key for key, _ in parse_qsl(split(url).query, keep_blank_values=True)]
    if left:
        place = _place(url)
        # After a bare ? in the password, the rest of the password looks like the name of an option.
        name = "***" if place.endswith("://***") else repr(left[0])
        raise ConfigurationError(
            f"{place}: there is no option {name}; there are: {', '.join(known) or 'none'}"
        )


def _place(url: str) -> str:
    """Return `url` in a form that is safe to log, without its options."""
    # Redact first: a bare ? in the password would leave half of it in front.
    return redact(url).partition("?")[0]
