"""What several parts say of themselves, as one text."""

from __future__ import annotations

from collections.abc import Iterable


def distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text))


def listed(texts: Iterable[str]) -> str:
    return "; ".join(distinct(texts))
