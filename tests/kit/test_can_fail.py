"""Each test of the kit is tried on a part that is wrong on purpose: it must find it out.

Two pytests of their own run them all side by side; the tests here read their reports.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.kit.tries import TRIES, Try

FILE = Path(__file__).with_name("wrong_contracts.py")
ROOT = FILE.parents[2]
PATIENCE = "3"
LIMIT = 400.0
"""Seconds that the pytests may take."""

Report = dict[tuple[str, str], str | None]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Run the meant tests on the wrong parts and the honest ones: what each failed with."""
    directory = tmp_path_factory.mktemp("kit")
    wanted = {(trial.on_trial, test) for trial in TRIES for test in trial.tests}
    wanted |= {(trial.honest, test) for trial in TRIES for test in trial.tests}
    ordered = sorted(wanted)
    runs = [
        (run_pytest(half, log := directory / f"{at}.log", log.with_suffix(".xml")), log)
        for at, half in enumerate((ordered[0::2], ordered[1::2]))
    ]
    found: Report = {}
    for run, log in runs:
        try:
            run.wait(LIMIT)
        finally:
            run.kill()
        assert log.with_suffix(".xml").exists(), log.read_text()
        found |= read(log.with_suffix(".xml"))
    assert wanted == found.keys()
    return found


def run_pytest(wanted: list[tuple[str, str]], log: Path, xml: Path) -> subprocess.Popen[bytes]:
    """Start a pytest of these tests, each by its class and its name."""
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
        f"--junitxml={xml}", *(f"{FILE}::{name}::{test}" for name, test in wanted),
    ]  # fmt: skip
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "QTASKS_CONFORMANCE_PATIENCE": PATIENCE,
            },
        )


def read(xml: Path) -> Report:
    """Return what each test of a report failed with, None where it passed."""
    found: Report = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        told = [f"{child.tag}: {child.get('message')}\n{child.text}" for child in case]
        name = (case.get("classname", "").rpartition(".")[2], case.get("name", ""))
        found[name] = "\n".join(told) or None
    return found


@pytest.mark.parametrize(
    ("trial", "test"),
    [
        pytest.param(trial, test, id=f"{trial.contract}-{trial.name}-{test}")
        for trial in TRIES
        for test in trial.tests
    ],
)
def test_the_wrong_part_is_found_out(report: Report, trial: Try, test: str) -> None:
    """The meant test fails on it, by a failure of its own, and passes on the honest part."""
    assert report[trial.honest, test] is None
    told = report[trial.on_trial, test]
    assert told is not None, "the kit did not notice"
    assert told.startswith("failure: "), told
