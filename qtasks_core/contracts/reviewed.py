"""The contract of a broker or storage whose migration an operator can read before it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod


class ReviewedMigration(ABC):
    """A broker or storage that can print what `migrate` would do, as a script for its server."""

    @abstractmethod
    async def migration(self, namespace: str) -> str:
        """Return the script that brings the server to this release's version. Changes nothing.

        Empty if nothing has to change. Raises the same errors as `start`.
        """
