"""What the drivers do alone: the same operations in the same batches, without any guarantee.

Each module has `run(url, tasks)`, which returns the rates `bulk`, `process` (a second) and the
round trip's `p50` and `p99` (milliseconds). Enqueuing writes a message and a record; processing
reads messages, reads their records, writes results and acknowledges, 256 at a time.
"""

BATCH = 500
RECEIVE = 256
ROUND_TRIPS = 1000
MESSAGE = b"\x01" + bytes(100)
"""About as long as the message of a task without arguments."""
RECORD = b"\x01" + bytes(160)
"""About as long as its record."""
