"""Each test of the kit is tried on a part that is wrong on purpose: it must find it out.

Some pytests of their own run them all side by side; the tests here read their reports.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.kit.tries import TRIES, Try

FILE = Path(__file__).with_name("wrong_contracts.py")
ROOT = FILE.parents[2]
SHARES = 3
"""How many run side by side: they mostly wait."""
PATIENCE = "3"
"""Seconds they wait for what does not come."""
LIMIT = 2400.0
"""Seconds that the pytests may take."""

Report = dict[tuple[str, str], str | None]


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Run the meant tests on the wrong parts and the honest ones: what each failed with."""
    directory = tmp_path_factory.mktemp("kit")
    wanted: set[tuple[str, str]] = set()
    for item in request.session.items:  # only what was selected on the command line
        if isinstance(item, pytest.Function) and "report" in item.fixturenames:
            trial, test = item.callspec.params["trial"], str(item.callspec.params["test"])
            assert isinstance(trial, Try)
            wanted |= {(trial.on_trial, test), (trial.honest, test)}
    ordered = sorted(wanted)
    shares = [share for start in range(SHARES) if (share := ordered[start::SHARES])]
    found: Report = {}
    with ExitStack() as end:
        runs = [run_pytest(share, directory / str(at), end) for at, share in enumerate(shares)]
        for at, run in enumerate(runs):
            run.wait(LIMIT)
            xml = directory / f"{at}.xml"
            assert xml.exists(), (directory / f"{at}.log").read_text()
            found |= read(xml)
    assert wanted == found.keys()
    return found


def run_pytest(
    wanted: list[tuple[str, str]], path: Path, end: ExitStack
) -> subprocess.Popen[bytes]:
    """Start a pytest of these tests, each by its class and its name; killed at the end at last."""
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
        f"--junitxml={path}.xml", *(f"{FILE}::{name}::{test}" for name, test in wanted),
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(ROOT), "QTASKS_CONFORMANCE_PATIENCE": PATIENCE}
    log = end.enter_context(path.with_suffix(".log").open("wb"))
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
    )
    end.callback(run.wait)
    end.callback(run.kill)
    return run


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
