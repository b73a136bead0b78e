"""What differs between a laptop, the tests and production: read from the environment once."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Without a broker's URL the store uses the embedded default."""

    name: str = "store"
    """Stores of different names share nothing, though they use the same servers."""
    broker_url: str | None = None
    storage_url: str | None = None
    patience: float = 10.0
    """Seconds that a request waits for a task."""
    concurrency: int = 20
    """Tasks that a worker runs at once."""

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
