"""What an operator is told of a topic's settings. The tests' server is one machine."""

from __future__ import annotations

import pytest

from qtasks_kafka.connection import KEPT, advice_on

FINE = {**KEPT, "min.insync.replicas": "2"}


def test_nothing_is_said_of_a_topic_that_is_set_up_well() -> None:
    assert list(advice_on(3, FINE)) == []


@pytest.mark.parametrize(
    ("replicas", "settings", "told"),
    [
        (1, FINE, "replication factor 1: "),
        (1, {**FINE, "min.insync.replicas": "1"}, "replication factor 1: "),
        (3, {**FINE, "min.insync.replicas": "1"}, "min.insync.replicas=1: one machine alone may"),
        (3, {**FINE, "retention.ms": "604800000"}, "retention.ms=604800000: Kafka deletes"),
        (3, {**FINE, "retention.bytes": "1"}, "retention.bytes=1: Kafka deletes"),
        (3, {}, "its settings are not known: give the user DESCRIBE_CONFIGS"),
    ],
)
def test_each_setting_that_loses_messages_is_named(
    replicas: int, settings: dict[str, str], told: str
) -> None:
    (line,) = advice_on(replicas, settings)
    assert line.startswith(told)
