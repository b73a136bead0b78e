"""What the log says of a server out of reach: that it is, each minute that it still is, its end."""

from __future__ import annotations

import logging
import re
import time

from qtasks_core.errors import Unavailable

logger = logging.getLogger("qtasks")

_AGAIN = 60.0
"""Seconds. Attempts follow each other faster: an outage of an hour would be thousands of lines."""
_SERVER = re.compile(r".*?\w://[^\s,;]+")
"""Where an error says which server it is: an outage has many errors, as each call sees it."""


class Outage:
    """The failures of one caller, from the first until `over`."""

    def __init__(self, caller: str = "") -> None:
        self._prefix = f"{caller}: " if caller else ""
        self._told: dict[str, float] = {}

    def failed(self, error: Unavailable) -> None:
        """Say what failed, unless that, or another trouble with that server, was said lately."""
        text, now = str(error), time.monotonic()
        server = _SERVER.match(text)
        trouble = server[0] if server else text
        self._told = {what: at for what, at in self._told.items() if now - at < _AGAIN}
        if trouble not in self._told:
            self._told[trouble] = now
            logger.warning("%s%s; trying again", self._prefix, text)

    def over(self) -> None:
        """Say that the server answers, if it was said that it does not."""
        if self._told:
            self._told.clear()
            logger.warning("%sthe server answers again", self._prefix)
