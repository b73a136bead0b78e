"""`docs/design.md` walks one task through the files: those that it really reaches, and few."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST = 25
"""More would be too many to read in one sitting."""


def walked() -> list[str]:
    """Return the files that the first section of the page names, in their order."""
    text = (ROOT / "docs/design.md").read_text()
    section = text.split("\n## ")[1]
    assert section.startswith("The way of one task")
    return list(dict.fromkeys(re.findall(r"`(qtasks\w*/[\w/]+\.py)`", section)))


def test_the_walk_names_the_files_that_a_task_reaches(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.docs.one_task", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    reached = set(ran.stdout.split())
    assert reached == set(walked())
    assert len(reached) <= MOST
