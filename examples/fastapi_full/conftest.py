"""The store in memory: said before anything of it is imported."""

from __future__ import annotations

import os

os.environ["STORE_BROKER_URL"] = "memory://store"
