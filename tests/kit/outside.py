"""A pytest of its own, in another directory, as a stranger runs the kit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(directory: Path, text: str, *arguments: str, **environment: str) -> str:
    """Run the tests of a module with this text, `test_mine.py`; return what was printed."""
    (directory / "test_mine.py").write_text(text)
    (directory / "pytest.ini").write_text("[pytest]\n")
    path = f"{ROOT}{os.pathsep}{directory}"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=directory, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    return ran.stdout + ran.stderr
