"""PostgreSQL for the tests, durable as it comes."""

from __future__ import annotations

import signal
import subprocess

from qtasks.testing.errors import NotReady
from qtasks.testing.recipes import RECIPES
from tests.services.container import Contained
from tests.services.native import ByRecipe
from tests.services.service import Service, Way


class NativePostgres(ByRecipe):
    """Debian's postgresql."""

    recipe = RECIPES["postgres"]
    shut_down_signal = signal.SIGINT  # SIGTERM would wait for its clients to leave

    def kill(self) -> None:
        super().kill()
        # The killed server cannot take its segment of shared memory along, and only its next start
        # in this directory would: remove it, as long as the file that names it is there.
        pid_file = self.directory / "data" / "postmaster.pid"
        if pid_file.exists() and len(lines := pid_file.read_text().splitlines()) > 6:
            segment = lines[6].split()[1]
            subprocess.run(["ipcrm", "-m", segment], stderr=subprocess.DEVNULL, check=False)


class PostgresServer(Service):
    name = "postgres"

    def native(self) -> Way:
        return NativePostgres()

    def container(self) -> Way:
        return Contained(RECIPES[self.name])

    async def probe(self, url: str) -> str:
        import asyncpg

        try:
            connection = await asyncpg.connect(url, timeout=5)
        except (OSError, asyncpg.PostgresError) as error:
            raise NotReady(str(error)) from error
        try:
            return str(await connection.fetchval("SHOW server_version")).split()[0]
        finally:
            await connection.close()
