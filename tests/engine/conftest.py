"""An app in memory, alone in its namespace."""

from __future__ import annotations

from uuid import uuid4

import pytest

from qtasks.asyncio import QueueTasks


@pytest.fixture
def app() -> QueueTasks:
    return QueueTasks(f"engine-{uuid4().hex[:8]}", "memory://?lease=1")
