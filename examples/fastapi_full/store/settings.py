"""The settings, read once from the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Settings that differ between development, tests and production."""

    name: str = "store"
    """The app's name. Apps with different names share nothing, even on the same servers."""
    broker_url: str | None = None
    """None: one SQLite file, the embedded default."""
    storage_url: str | None = None
    patience: float = 10.0
    """How many seconds a request waits for a task."""
    concurrency: int = 20
    """How many tasks a worker runs at once."""

    @classmethod
    def from_environment(cls) -> Settings:
        return cls(
            name=os.environ.get("STORE_NAME", cls.name),
            broker_url=os.environ.get("STORE_BROKER_URL"),
            storage_url=os.environ.get("STORE_STORAGE_URL"),
            patience=float(os.environ.get("STORE_PATIENCE", cls.patience)),
            concurrency=int(os.environ.get("STORE_CONCURRENCY", cls.concurrency)),
        )


settings = Settings.from_environment()
