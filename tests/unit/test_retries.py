"""How often tasks run again and when: for any attempt, and for exceptions of several classes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtasks import ConfigurationError, Retry
from qtasks.plugins import Again, Backoff, GiveUp, Retries, Run
from qtasks_core import TaskMessage

backoffs = st.builds(
    Backoff,
    retries=st.integers(0, 10**6),
    first=st.floats(0, 1e6),
    factor=st.floats(1, 1e6),
    longest=st.floats(0, 1e6),
)
attempts = st.integers(1, 10**6)


def run(attempt: int) -> Run:
    return Run(TaskMessage(uuid="u", task_name="t", attempt=attempt))


class Busy(ConnectionError):
    def __init__(self, retry_after: object) -> None:
        self.retry_after = retry_after


@given(backoffs, attempts)
def test_a_delay_is_within_its_bounds(backoff: Backoff, attempt: int) -> None:
    try:
        grown = backoff.first * backoff.factor ** (attempt - 1)
    except OverflowError:
        grown = math.inf if backoff.first else 0.0
    assert 0 <= backoff.delay(attempt) <= min(backoff.longest, grown)


@given(backoffs, attempts)
def test_the_bound_does_not_shrink_from_run_to_run(backoff: Backoff, attempt: int) -> None:
    assert backoff.most(attempt) <= backoff.most(attempt + 1)


def test_the_jitter_is_full() -> None:
    delays = [Backoff(9).delay(5) for _ in range(1000)]
    assert (min(delays) < 2, max(delays) > 14, max(delays) <= 16) == (True, True, True)


@given(backoffs, attempts, st.floats(0, 1e9))
def test_an_exception_is_waited_for_as_long_as_it_asks(
    backoff: Backoff, attempt: int, asked: float
) -> None:
    decision = backoff.decide(run(attempt), Busy(asked))
    if attempt > backoff.retries:
        assert isinstance(decision, GiveUp)
    else:
        assert isinstance(decision, Again)
        assert asked <= decision.after <= max(asked, backoff.longest)


@pytest.mark.parametrize("asked", [math.nan, math.inf, -5, "5", None])
async def test_an_exception_that_asks_nonsense_is_not_heard(asked: object) -> None:
    decision = await Retries(Backoff(1, longest=2)).decide(run(1), Busy(asked))
    assert isinstance(decision, Again)
    assert 0 <= decision.after <= 2


async def test_the_nearest_class_counts() -> None:
    class Refused(ConnectionRefusedError, ValueError):
        pass

    retries = Retries(2, {OSError: 3, ConnectionError: Backoff(4), ValueError: 0, Busy: 5})
    errors = [KeyError(), OSError(), FileNotFoundError(), ConnectionResetError(), Busy(1)]
    found = [retries.backoff(error) for error in [*errors, UnicodeError(), Refused()]]
    assert [backoff and backoff.retries for backoff in found] == [2, 3, 3, 4, 5, 0, 4]
    assert await retries.decide(run(1), UnicodeError()) == GiveUp("no retry is configured")
    assert isinstance(await retries.decide(run(4), Busy(0)), Again)
    assert await retries.decide(run(4), KeyError()) == GiveUp("failed 4 times")


async def test_what_is_not_named_can_be_left_to_others() -> None:
    retries = Retries(None, {OSError: 1})
    assert isinstance(await retries.decide(run(1), OSError()), Again)
    assert await retries.decide(run(2), OSError()) == GiveUp("failed 2 times")
    assert await retries.decide(run(1), ValueError()) is None


async def test_a_function_that_asks_for_another_run_gets_it() -> None:
    retries = Retries(Backoff(0, longest=300), {Retry: Backoff(0, first=0)})
    assert await retries.decide(run(2000), Retry(after=30)) == Again(30)
    assert await retries.decide(run(2000), Retry()) == Again(0)
    assert isinstance(await Retries(0).decide(run(2000), Retry()), Again)


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf])
def test_a_time_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"Retry\(after=.*seconds, 0 or more"):
        Retry(after=seconds)
    with pytest.raises(ValueError, match=r"Again\(after=.*seconds, 0 or more"):
        Again(seconds)
    for option in ("first", "factor", "longest"):
        with pytest.raises(ConfigurationError, match=option):
            Backoff(1, **{option: seconds})


def test_counts_and_factors_below_their_least_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="retries=-1"):
        Retries(-1)
    with pytest.raises(ConfigurationError, match=r"factor=0\.5"):
        Backoff(1, factor=0.5)
