"""The bare drivers: the same operations in the same batches, without QTasks and its guarantees.

Each module has `run(url, tasks)`. It returns the rates `bulk` and `process` (per second) and the
round trips `p50` and `p99` (milliseconds). Enqueuing writes a message and a record. Processing
reads messages and their records, writes results and acknowledges, 256 at a time.
"""

BATCH = 500
RECEIVE = 256
ROUND_TRIPS = 1000
MESSAGE = b"\x01" + bytes(100)
"""As long as a typical message of a task without arguments."""
RECORD = b"\x01" + bytes(160)
"""As long as the record of such a task."""
