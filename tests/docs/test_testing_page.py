"""The blocks of docs/testing.md are the files of one project, whose tests pass as they stand."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.test_code_blocks import blocks_of
from tests.processes import ROOT, Process
from tests.services import Service


def test_the_project_of_the_page(
    tmp_path: Path, redis_server: Service, postgres_server: Service
) -> None:
    blocks = blocks_of(ROOT / "docs" / "testing.md")
    assert all(block.file for block in blocks)
    for block in blocks:
        (tmp_path / block.file).write_text(block.code)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
    )
    tests = sum(block.code.count("def test_") for block in blocks)
    parameters = sum(len(re.findall(r'"\w+"', p)) for block in blocks
                     for p in re.findall(r'"qtasks_url", \[(.*?)\]', block.code))  # fmt: skip
    environment = {
        "QTASKS_TEST_REDIS_URL": redis_server.url,
        "QTASKS_TEST_POSTGRES_URL": postgres_server.url,
        "CI": "true",
    }
    with Process("-m", "pytest", "-q", environment=environment, cwd=tmp_path) as run:
        status = run.wait()
        assert (status, f"{tests - 1 + parameters} passed" in run.output()) == (0, True)
