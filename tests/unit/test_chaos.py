"""The schedule of `benchmarks.chaos`."""

from __future__ import annotations

from collections import Counter
from itertools import islice, takewhile

import pytest

from benchmarks.chaos import faults, options_of

PERIODS = {"kill-worker": 3.0, "kill-server": 12.0, "freeze-storage": 20.0}


def test_a_seed_gives_the_same_faults_again() -> None:
    first, again, other = (list(islice(faults(seed, PERIODS), 200)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_faults_come_in_order_and_as_often_as_asked() -> None:
    some = list(takewhile(lambda fault: fault.at < 10_000, faults(1, PERIODS)))
    assert [fault.at for fault in some] == sorted(fault.at for fault in some)
    counts = Counter(fault.kind for fault in some)
    for kind, period in PERIODS.items():
        lasting = sum(fault.seconds for fault in some if fault.kind == kind)
        assert counts[kind] == pytest.approx((10_000 - lasting) / period, rel=0.1)


def test_a_kind_with_period_0_never_comes() -> None:
    kinds = {fault.kind for fault in islice(faults(1, PERIODS | {"kill-worker": 0.0}), 100)}
    assert kinds == {"kill-server", "freeze-storage"}
    assert list(faults(1, dict.fromkeys(PERIODS, 0.0))) == []


def test_a_part_without_a_server_cannot_lose_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options_of(["--broker", "sqlite"])
    assert "sqlite has no server: give --kill-server 0" in capsys.readouterr().err
    assert options_of(["--broker", "sqlite", "--kill-server", "0", "--freeze-storage", "0"])
