"""Finding the backend a URL names, among the entry points of the group `qtasks.backends`."""

from __future__ import annotations

from qtasks_core.contracts.backend import CONTRACT_VERSION, Backend
from qtasks_core.contracts.broker import Broker
from qtasks_core.contracts.storage import Storage
from qtasks_core.errors import ConfigurationError
from qtasks_core.urls import redact

GROUP = "qtasks.backends"


def resolve_broker(url: str) -> Broker:
    """Return the (not yet started) broker that `url` names. Raises `ConfigurationError`."""
    return find_backend(url).broker(url)


def resolve_storage(url: str) -> Storage:
    """Return the (not yet started) storage that `url` names. Raises `ConfigurationError`."""
    return find_backend(url).storage(url)


def find_backend(url: str) -> Backend:
    """Return the backend registered for the scheme of `url`. Raises `ConfigurationError`."""
    from importlib.metadata import entry_points  # slow to import, and needed for URLs only

    scheme, colon, rest = url.partition(":")
    if not colon:
        raise ConfigurationError(f"{redact(url)!r} is not a URL; try sqlite:///qtasks.db")
    found = entry_points(group=GROUP, name=scheme)
    if not found and not rest.startswith("//"):
        # A host and its port, most likely; what stands behind may be a password.
        raise ConfigurationError(f"'{scheme}:…' is not a URL; try sqlite:///qtasks.db")
    plain, plus, _ = scheme.partition("+")
    if not found and plus and entry_points(group=GROUP, name=plain):
        raise ConfigurationError(f"{redact(url)}: write {plain}://, without the name of a driver")
    if not found:
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
