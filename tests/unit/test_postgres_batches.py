"""What Postgres writes at once, encoded no earlier than it is written."""

from __future__ import annotations

from qtasks_postgres.batches import MOST_BYTES, MOST_ITEMS, batches


def test_an_item_is_encoded_when_its_batch_is_due() -> None:
    encoded: list[int] = []

    def encode(item: int) -> bytes:
        encoded.append(item)
        return b"x"

    items = range(2 * MOST_ITEMS + 1)
    cut = batches(items, encode)
    first = next(cut)
    # The item after the batch tells that it is full.
    assert (len(first), len(encoded)) == (MOST_ITEMS, MOST_ITEMS + 1)
    rest = [pair for batch in cut for pair in batch]
    assert [item for item, _ in first + rest] == encoded == list(items)


def test_a_batch_has_no_more_bytes_than_a_statement_takes() -> None:
    sizes = (MOST_BYTES // 2, MOST_BYTES // 2, 1, 2 * MOST_BYTES, 1)
    cut = [[size for size, _ in batch] for batch in batches(sizes, lambda size: b"x" * size)]
    assert cut == [[MOST_BYTES // 2, MOST_BYTES // 2], [1], [2 * MOST_BYTES], [1]]


def test_nothing_is_no_batch() -> None:
    assert list(batches([], lambda item: item)) == []
