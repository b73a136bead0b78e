"""Tests of tests: they run with `--full`, and as long as what they look at has changed.

`make verify` runs those of what has changed, and once they pass notes in `unchanged.json` for which
content that was. Commit it with the change.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTED = Path(__file__).with_suffix(".json")
STAND_INS = ROOT / "tests" / "services" / "stand_ins"
LOOK_AT = {
    "tests/kit/test_can_fail.py": (
        "qtasks_conformance", "qtasks_core", "qtasks_memory", "qtasks_sqlite", "tests/kit",
    ),
    "tests/packaging/test_stranger.py": (
        "qtasks_conformance", "qtasks_core", "tests/stranger", "docs/backends.md",
    ),
    "tests/services_test/": (
        "qtasks/testing", "tests/services", "tests/services_test", "tests/containers.py", ".env",
        "compose.yaml",
        ".ci/run", *(str(path.relative_to(ROOT)) for path in STAND_INS.glob("[!_]*/*")),
    ),
}  # fmt: skip
"""What these tests depend on, by the path that they begin with: folders of modules, and files."""


def digest(places: tuple[str, ...]) -> str:
    """Return what tells the content of these folders and files from any other."""
    files = {ROOT / place for place in places if (ROOT / place).is_file()}
    files |= {path for place in places for path in (ROOT / place).rglob("*.py")}
    seen = hashlib.sha256()
    for path in sorted(files):
        seen.update(f"{path.relative_to(ROOT)}\0".encode())
        seen.update(path.read_bytes() + b"\0")
    return seen.hexdigest()


def changed() -> Iterator[str]:
    """Yield the tests that have not passed yet on what they look at."""
    noted = json.loads(NOTED.read_text()) if NOTED.exists() else {}
    for tests, places in LOOK_AT.items():
        if noted.get(tests) != digest(places):
            yield tests


def main() -> int:
    """Run the tests of what has changed, and note that they have passed."""
    due = list(changed())
    if not due:
        print("nothing has changed")
        return 0
    before = {tests: digest(LOOK_AT[tests]) for tests in due}
    code = subprocess.run([sys.executable, "-m", "pytest", "-n", "4", *due], cwd=ROOT).returncode
    if code == 0:
        noted = json.loads(NOTED.read_text()) if NOTED.exists() else {}
        NOTED.write_text(json.dumps({**noted, **before}, indent=2, sort_keys=True) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
