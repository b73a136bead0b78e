"""Of two settlements of one delivery one is obeyed."""

from qtasks_core import DONE, LOST, Ack, Delivery, Outcome, Release, Retry, TaskMessage
from qtasks_core.receivers import Recent, SettleCall

MESSAGE = TaskMessage(uuid="u", task_name="t")


def delivery(fence: object) -> Delivery:
    return Delivery(MESSAGE, "q", fence)


def test_the_first_is_obeyed_a_repeat_is_answered_alike_and_another_is_refused() -> None:
    mine, lost = delivery(1), delivery(2)
    call = SettleCall([Ack(mine), Ack(lost), Release(mine), Ack(mine), Ack(lost)])
    assert list(call.first) == [0, 1]
    call.done(0)
    assert call.outcomes() == [DONE, LOST, LOST, DONE, LOST]


def test_a_repeat_of_an_earlier_call_is_done_and_another_is_asked_about() -> None:
    mine, settled = delivery(1), Recent()
    call = SettleCall([Retry(mine, MESSAGE)], settled)
    settled.add(call.done(0))
    call = SettleCall([Ack(mine), Retry(mine, MESSAGE)], settled)
    assert list(call.first) == [0]
    assert call.outcomes() == [LOST, DONE]


def test_another_outcome_is_that_of_the_repeats_too() -> None:
    unknown, refused = Outcome("unknown", "no answer"), Outcome("refused", "too large")
    one, two = delivery(1), delivery(2)
    call = SettleCall([Ack(one), Ack(two), Ack(one), Ack(two)], obeyed=unknown)
    call.done(0)
    call.answer(1, refused)
    assert call.outcomes() == [unknown, refused] * 2
