"""Finding the backend of a URL, among the entry points of the group `qtasks.backends`."""

from __future__ import annotations

from typing import Literal

from qtasks_core.contracts.backend import CONTRACT_VERSION, Backend
from qtasks_core.contracts.broker import Broker
from qtasks_core.contracts.storage import Storage
from qtasks_core.distribution import GROUP, why_unregistered
from qtasks_core.errors import ConfigurationError
from qtasks_core.schemas import Guarantees
from qtasks_core.urls import redact


def resolve_broker(url: str) -> Broker:
    """Return the broker of `url`, not started yet. Raises `ConfigurationError`."""
    return find_backend(url).broker(url)


def resolve_storage(url: str) -> Storage:
    """Return the storage of `url`, not started yet. Raises `ConfigurationError`."""
    return find_backend(url).storage(url)


def find_backend(url: str) -> Backend:
    """Return the backend registered for the scheme of `url`. Raises `ConfigurationError`."""
    from importlib.metadata import entry_points  # slow to import, and only URLs need it

    scheme, colon, rest = url.partition(":")
    if not colon:
        raise ConfigurationError(f"{redact(url)!r} is not a URL; try sqlite:///qtasks.db")
    found = entry_points(group=GROUP, name=scheme)
    if not found and not rest.startswith("//"):
        # Most likely a host and its port. The text after them may be a password.
        raise ConfigurationError(f"'{scheme}:…' is not a URL; try sqlite:///qtasks.db")
    plain, plus, _ = scheme.partition("+")
    if not found and plus and entry_points(group=GROUP, name=plain):
        raise ConfigurationError(f"{redact(url)}: write {plain}://, without the name of a driver")
    if not found:
        if (why := why_unregistered()) is not None:
            raise ConfigurationError(why)
        known = ", ".join(sorted({entry.name for entry in entry_points(group=GROUP)}))
        raise ConfigurationError(f"no backend for {scheme}:// is installed; there are: {known}")
    entry = next(iter(found))
    backend = entry.load()()
    if not isinstance(backend, Backend):
        raise ConfigurationError(f"{entry.value}, registered for {scheme}://, is no Backend")
    if backend.contract != CONTRACT_VERSION:
        raise ConfigurationError(
            f"{entry.value} is written for contract {backend.contract}, "
            f"this release of qtasks has contract {CONTRACT_VERSION}"
        )
    return backend


def installed_parts(half: Literal["broker", "storage"]) -> list[Guarantees]:
    """Return the guarantees of each installed broker, or storage. None of them is started."""
    from importlib.metadata import entry_points  # slow to import

    found: dict[str, Guarantees] = {}
    for entry in entry_points(group=GROUP):
        # The URL of a server has a host, that of a file has a path.
        for url in (f"{entry.name}://localhost", f"{entry.name}:///{entry.name}"):
            try:
                backend = find_backend(url)
                part = backend.broker(url) if half == "broker" else backend.storage(url)
                told = part.guarantees
            except Exception:  # noqa: BLE001  # one broken backend must not hide others
                continue
            found.setdefault(told.part, told)
    return [found[name] for name in sorted(found)]
