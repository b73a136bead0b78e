"""The container images of the servers, from the file that compose.yaml reads them from too."""

from __future__ import annotations

import os
from pathlib import Path

FILE = Path(__file__).parents[2] / ".env"


def image(name: str) -> str:
    """Return the image of a server, `redis:8.2` say; the environment goes before the file."""
    lines = (line.strip() for line in FILE.read_text().splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    tags = {key: value for key, _, value in pairs}
    variable = f"QTASKS_IMAGE_{name.upper()}"
    return os.environ.get(variable) or tags[variable]
