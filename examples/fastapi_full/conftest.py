"""Runs the store in memory. This must be set before `store` is imported."""

from __future__ import annotations

import os

os.environ["STORE_BROKER_URL"] = "memory://store"
