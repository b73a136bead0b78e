"""The data that parts exchange: plain structs without behaviour.

Times are Unix times in seconds (float), durations are seconds (float), sizes are bytes.
Fields are only ever added, with a default: an older release ignores what it does not know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from msgspec import Meta, Struct, field

LONGEST_ID = 200
"""Characters of a uuid, an address, a key or an owner, of up to four bytes each."""
LONGEST = 1e11
"""Most seconds of a duration: some 3,000 years, and the sum of two is a date still."""
_Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=LONGEST)]
_Time: TypeAlias = Annotated[float, Meta(ge=0, le=1.2 * LONGEST)]
Id: TypeAlias = Annotated[str, Meta(min_length=1, max_length=LONGEST_ID)]
"""A uuid or an address: what `qtasks_core.names.is_id` allows. Checked when it is decoded."""
_OptionalId: TypeAlias = Annotated[str, Meta(max_length=LONGEST_ID)]

Status: TypeAlias = Literal["new", "scheduled", "process", "retry", "success", "error", "cancel"]


class TaskMessage(Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """What a broker carries: the order to run one task once.

    `args` and `kwargs` are encoded by the serializer named in `encoding`; empty bytes mean none.
    Brokers never look inside. What another program wrote is read within these bounds only: past
    them are numbers and keys that some server takes and another does not.
    """

    uuid: Id
    task_name: str
    queue: str = "default"
    args: bytes = b""
    kwargs: bytes = b""
    encoding: str = "msgpack"
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    """0 to 9, 9 first."""
    delay: _Seconds = 0.0
    """Seconds from the server's receipt before which the task must not start."""
    attempt: Annotated[int, Meta(ge=1, lt=2**31)] = 1
    """1 for the first run, one more with each retry. A redelivery is not a new attempt."""
    reply_to: Id | None = None
    """The `Inbox.address` that wants the final record."""
    created_at: _Time = 0.0
    expires_at: _Time | None = None
    """Past this time the task is not started any more."""
    store_result: bool = True
    retention: _Seconds | None = None
    """Seconds to keep the record after its end; None: the storage's default."""
    headers: dict[str, str] = field(default_factory=dict)
    """Room for plugins: trace context, signatures, tenant."""
    submission: _OptionalId = ""
    """Of a task with a key, whose uuid several may enqueue: the id of the one publishing that this
    message comes from. Only messages of the publishing that the record names are run."""


class Task(Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """What a storage keeps: the newest known state of one task.

    `returning` is the encoded result. `execution` is the id of one run of the function, before the
    first run the submission: saving the same execution with the same status twice is harmless.
    """

    uuid: Id
    task_name: str
    status: Status
    queue: str = "default"
    args: bytes = b""
    kwargs: bytes = b""
    encoding: str = "msgpack"
    priority: int = 5
    attempt: int = 1
    execution: str = ""
    returning: bytes | None = None
    error: str | None = None
    """One line: the exception's type and message."""
    traceback: str | None = None
    dead: str | None = None
    """On `error`: why it will not be tried again."""
    worker: str | None = None
    reply_to: Id | None = None
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    due_at: float | None = None
    """On `scheduled` and `retry`: about when it will run (the sender's clock)."""
    retention: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    submission: str = ""
    """Of a task with a key: the publishing that has the key, whose messages are run."""


class Raw(Struct, frozen=True):
    """A message that could not be decoded, kept as it came."""

    data: bytes
    error: str


class Delivery(Struct, frozen=True, eq=False):
    """One message handed to one receiver, who holds it under a lease."""

    message: TaskMessage | Raw
    queue: str
    fence: Any
    """Opaque proof of ownership; only the broker that made it can read it. It may be an object with
    state of its own: the very same object comes back in `settle` and `extend`."""
    count: int | None = None
    """How often this message has been delivered, this time included; None where unknown."""


class Ack(Struct, frozen=True, eq=False):
    """Settle: the delivery is done with."""

    delivery: Delivery


class Retry(Struct, frozen=True, eq=False):
    """Settle: replace the delivery by `message`, due after `message.delay` seconds."""

    delivery: Delivery
    message: TaskMessage


class Release(Struct, frozen=True, eq=False):
    """Settle: give the delivery back unchanged; it may be received again at once."""

    delivery: Delivery


Settlement: TypeAlias = Ack | Retry | Release


class Outcome(Struct, frozen=True):
    """What became of one item of a batch.

    `refused` is an answer, not an error: the lease was lost, there is a newer record, the queue
    does not take the message. `taken` is the answer to a submission whose key another one has.
    `unknown` means that the server does not say (never a guessed `done`).
    """

    status: Literal["done", "refused", "taken", "unknown"]
    reason: str = ""
    current: Task | None = None
    """The existing record, for which `save` refused this one or which has the key."""


DONE = Outcome("done")
LOST = Outcome("refused", "the lease was lost")


class Completion(Struct, frozen=True, eq=False):
    """The end of one run: how to settle its delivery and what to record. Either may be absent."""

    settlement: Settlement | None
    task: Task | None


Verdict: TypeAlias = Literal["run", "final", "cancelled", "stale", "dead"]
"""What `Composition.admit` says of a delivery; all but `run` are only acknowledged."""


class QueueDepth(Struct, frozen=True):
    """How much is in a queue. None: this transport cannot know."""

    ready: int | None = None
    delayed: int | None = None
    in_flight: int | None = None


class Guarantees(Struct, frozen=True, kw_only=True):
    """What one part promises, as it is configured and as its server is.

    `lease` is the time in seconds after which a delivery of a dead receiver goes to another; the
    receiver calls `extend` at least every third of it.
    """

    part: str
    """The class, for instance `RedisBroker`."""
    server: str = ""
    """Product and version, as far as known after `start`."""
    survives: Literal["nothing", "client crash", "server crash", "machine crash"]
    """The worst event after which nothing acknowledged is missing."""
    durability: str
    """The setting behind `survives`, in the server's own words."""
    lease: float | None = None
    """Brokers only."""
    retention: float | None = None
    """Storages only: seconds that final records are kept which do not say so, infinity: for ever.
    None: all are kept for ever, whatever they say."""
    settle_confirmed: bool = True
    """Brokers: the server answers a settle, so its outcome is known."""
    atomic_retries: bool = False
    """Brokers: a retry takes the place of its delivery in one step, so there is one message of the
    task whenever a crash comes, and however often the settle is made again. Otherwise the new one
    is there before the old one is gone: each try that is cut off may leave one message more."""
    leases_survive: bool = False
    """Brokers: a lease outlives a crash of the server, so what is held stays held."""
    order: Literal["none", "queue", "partition"] = "none"
    """Brokers: messages that one publisher sends one after the other, of one priority and without
    a delay, come for the first time in that order; in the whole queue, or in each of the parts
    that it is divided into."""
    largest: int | None = None
    """The largest encoded message or record that is taken, in bytes; None: no bound is known."""
    counts_deliveries: bool = False
    priorities: bool = False
    transactions: bool = False
    """`publish` or `save` accept the caller's transaction."""
    unsupported: tuple[str, ...] = ()
    """Methods of the contract that raise `NotSupported`."""
    notes: tuple[str, ...] = ()


RETRIES_IN_TWO_STEPS = (
    "a retry is published before the message that it replaces is acknowledged: a crash in between "
    "leaves both, of which the engine drops the old one; a settle that was cut off and is made "
    "again may run the next attempt twice"
)
"""A note for the guarantees of brokers without `atomic_retries`."""


class TaskQuery(Struct, frozen=True, kw_only=True):
    """Which records to list, newest first. Fields left None do not filter.

    `created_after` is inclusive, `created_before` is not; `limit` is at least 1.
    """

    status: tuple[Status, ...] | None = None
    task_name: str | None = None
    queue: str | None = None
    created_after: float | None = None
    created_before: float | None = None
    dead: bool | None = None
    limit: int = 100
    cursor: str | None = None


class TaskPage(Struct, frozen=True):
    """One page of a query; `cursor` goes on with the next, None at the end."""

    tasks: list[Task]
    cursor: str | None = None


class Claim(Struct, frozen=True):
    """A key held by one owner until `expires_at` unless it is claimed again."""

    key: Id
    owner: Id
    expires_at: float


class Command(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A word to every worker of a namespace."""

    name: str
    """`cancel`, `pause`, `resume`, `ping`, …"""
    target: str | None = None
    """A uuid, queue or worker; None: all."""
    arguments: dict[str, str] = field(default_factory=dict)


class Running(NamedTuple):
    """One task that a worker runs now."""

    uuid: str
    task_name: str
    started_at: float


class WorkerInfo(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a worker tells of itself, kept as the shared value `worker/ID`."""

    id: str
    host: str
    pid: int
    queues: tuple[str, ...] = ()
    concurrency: int = 1
    """How many tasks it runs at once."""
    running: tuple[Running, ...] = ()
    """Those that run longest; how many it names is bounded."""
    started_at: float = 0.0
    seen_at: float = 0.0
    """When it last said so; a worker that has been silent for long is gone."""
    version: str = ""
    """The release of qtasks that it runs."""
