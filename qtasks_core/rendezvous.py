"""Choosing one of several places by a key, so that a new place takes only its share of the keys."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b


def chosen(places: Iterable[bytes], key: bytes) -> bytes:
    """Return the place of a key (https://en.wikipedia.org/wiki/Rendezvous_hashing)."""
    return max(places, key=lambda place: blake2b(place + b"\0" + key, digest_size=8).digest())
