"""The data that components exchange: plain structs without behaviour.

Times are Unix times in seconds (float), durations are seconds (float), sizes are bytes. Fields are
only ever added, and with a default. An older release ignores fields that it does not know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args

from msgspec import Meta, Struct, field

LONGEST_ID = 200
"""The most characters of a uuid, an address, a key or an owner, of up to four bytes each."""
LONGEST = 1e11
"""The most seconds of a duration: some 3,000 years. The sum of two is still a valid date."""
_Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=LONGEST)]
_Time: TypeAlias = Annotated[float, Meta(ge=0, le=1.2 * LONGEST)]
Id: TypeAlias = Annotated[str, Meta(min_length=1, max_length=LONGEST_ID)]
"""A uuid or an address, as `qtasks_core.names.is_id` allows it. Checked when it is decoded."""
_OptionalId: TypeAlias = Annotated[str, Meta(max_length=LONGEST_ID)]

Status: TypeAlias = Literal["new", "scheduled", "process", "retry", "success", "error", "cancel"]


class TaskMessage(Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """The message that a broker carries: the order to run one task once.

    The serializer named in `encoding` encodes `args` and `kwargs`. Empty bytes mean none. Brokers
    never look inside. Decoding accepts only values within these bounds, because other programs may
    write messages too. Outside the bounds, some servers accept a number or a key, and others do
    not.
    """

    uuid: Id
    task_name: str
    queue: str = "default"
    args: bytes = b""
    kwargs: bytes = b""
    encoding: str = "msgpack"
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    """0 to 9; 9 goes first."""
    delay: _Seconds = 0.0
    """Seconds after the server receives the message. The task must not start earlier."""
    attempt: Annotated[int, Meta(ge=1, lt=2**31)] = 1
    """1 for the first run, plus 1 for each retry. A redelivery is not a new attempt."""
    reply_to: Id | None = None
    """The `Inbox.address` that wants the final record."""
    created_at: _Time = 0.0
    expires_at: _Time | None = None
    """After this time the task is not started any more."""
    store_result: bool = True
    retention: _Seconds | None = None
    """Seconds to keep the record after the task has finished. None: the storage's default."""
    headers: dict[str, str] = field(default_factory=dict)
    """For plugins: trace context, signatures, tenant."""
    submission: _OptionalId = ""
    """For a task with a key: the id of the submission that this message comes from. Several clients
    may enqueue such a uuid. Only messages of the submission that the record names run."""


class Task(Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """The record that a storage keeps: the newest known state of one task.

    `returning` is the encoded result. `execution` is the id of one run of the function; before the
    first run it is the submission. Saving the same execution with the same status twice is
    harmless.
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
    """One line: the type and message of the exception."""
    traceback: str | None = None
    dead: str | None = None
    """For `error`: why the task is not tried again."""
    worker: str | None = None
    reply_to: Id | None = None
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    due_at: float | None = None
    """For `scheduled` and `retry`: about when the task will run, by the sender's clock."""
    retention: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    submission: str = ""
    """For a task with a key: the submission that has the key. Only its messages run."""


class Raw(Struct, frozen=True):
    """A message that could not be decoded, kept unchanged."""

    data: bytes
    error: str


class Delivery(Struct, frozen=True, eq=False):
    """One message that one receiver holds under a lease."""

    message: TaskMessage | Raw
    queue: str
    fence: Any
    """Opaque proof that the receiver holds the delivery. Only the broker that made it can read it.
    It may be an object with its own state: `settle` and `extend` get the very same object."""
    count: int | None = None
    """How often this message has been delivered, including this time. None if it is unknown."""


class Ack(Struct, frozen=True, eq=False):
    """Settle: the delivery is finished."""

    delivery: Delivery


class Retry(Struct, frozen=True, eq=False):
    """Settle: replace the delivery with `message`, due after `message.delay` seconds."""

    delivery: Delivery
    message: TaskMessage


class Release(Struct, frozen=True, eq=False):
    """Settle: return the delivery unchanged. It may be received again at once."""

    delivery: Delivery


Settlement: TypeAlias = Ack | Retry | Release


class Outcome(Struct, frozen=True):
    """The outcome of one item of a batch.

    `refused` is an answer, not an error: the lease was lost, a newer record exists, or the queue
    does not accept the message. `taken` answers a submission whose key another submission has.
    `unknown` means that the server does not say; it is never a guessed `done`.
    """

    status: Literal["done", "refused", "taken", "unknown"]
    reason: str = ""
    current: Task | None = None
    """The existing record: `save` refused this record because of it, or it has the key."""


DONE = Outcome("done")
LOST = Outcome("refused", "the lease was lost")


class Completion(Struct, frozen=True, eq=False):
    """The result of one run: how to settle its delivery and what to record. Both are optional."""

    settlement: Settlement | None
    task: Task | None


Verdict: TypeAlias = Literal["run", "final", "cancelled", "stale", "dead"]
"""The answer of `Composition.admit` for a delivery. All but `run` are only acknowledged."""


class QueueDepth(Struct, frozen=True):
    """How many messages are in a queue. None: this transport cannot know."""

    ready: int | None = None
    delayed: int | None = None
    in_flight: int | None = None
    oldest_age: float | None = None
    """Seconds since the oldest ready message became ready. None also if no message is ready."""


Survives = Literal["nothing", "client crash", "server crash", "machine crash"]
Order = Literal["none", "partition", "queue"]
EVENTS = get_args(Survives)
"""What a part may survive, from the least to the worst event."""
ORDERS = get_args(Order)
"""How far a broker may keep the order of messages, from the least to the most."""


class Guarantees(Struct, frozen=True, kw_only=True):
    """What one broker or storage promises, as it and its server are configured.

    `lease` is a time in seconds. After it, the delivery of a dead receiver goes to another
    receiver. A receiver calls `extend` at least every third of it.
    """

    part: str
    """The class, for example `RedisBroker`."""
    server: str = ""
    """Product and version, as far as they are known after `start`."""
    survives: Survives
    """The worst event after which nothing that was acknowledged is missing."""
    durability: str
    """The setting behind `survives`, in the words of the server."""
    at_best: Survives | None = None
    """The worst event that it survives with `best_settings`. None: what `survives` says."""
    best_settings: str = ""
    """The settings for `at_best`, in the words of the server."""
    lease: float | None = None
    """Only for brokers."""
    retention: float | None = None
    """Only for storages: seconds that final records are kept if they have no retention. Infinity:
    for ever. None: the storage keeps all records for ever, whatever their retention."""
    settle_confirmed: bool = True
    """Brokers: the server answers a settle, so its outcome is known."""
    atomic_retries: bool = False
    """Brokers: a retry replaces its delivery in one step. So the task has one message, whenever a
    crash comes and however often the settle is repeated. Otherwise the new message exists before
    the old one is gone. Then each try that is cut off may leave one more message."""
    leases_survive: bool = False
    """Brokers: a lease outlives a crash of the server, so a held delivery stays held."""
    order: Order = "none"
    """Brokers: the order of messages that one publisher sends one after the other, with one
    priority and no delay. They arrive for the first time in that order, in the whole queue or in
    each partition of it."""
    largest: int | None = None
    """The largest encoded message or record that is accepted, in bytes. None: no limit is known."""
    counts_deliveries: bool = False
    priorities: bool = False
    transactions: bool = False
    """`publish` or `save` accept the caller's transaction."""
    unsupported: tuple[str, ...] = ()
    """Methods of the contract that raise `NotSupported`."""
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    """What an operator should change on this server, or in the user's rights. `qtasks check` prints
    it. Known after `start`, or once the part has used what it concerns."""


RETRIES_IN_TWO_STEPS = (
    "a retry is published before the message that it replaces is acknowledged: a crash in between "
    "leaves both, of which the engine drops the old one; a settle that was cut off and is made "
    "again may run the next attempt twice"
)
"""A note for the guarantees of brokers without `atomic_retries`."""


class TaskQuery(Struct, frozen=True, kw_only=True):
    """Which records to list, newest first. A field that is None does not filter.

    `created_after` is inclusive, `created_before` is exclusive. `limit` is at least 1.
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
    """One page of a query. `cursor` gets the next page; None on the last one."""

    tasks: list[Task]
    cursor: str | None = None


class Claim(Struct, frozen=True):
    """A key that one owner holds until `expires_at`, unless it claims the key again."""

    key: Id
    owner: Id
    expires_at: float


class Command(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A command to every worker of a namespace."""

    name: str
    """`cancel`, `pause`, `resume`, `ping`, …"""
    target: str | None = None
    """A uuid, queue or worker; None: all."""
    arguments: dict[str, str] = field(default_factory=dict)


class Running(NamedTuple):
    """One task that a worker is running."""

    uuid: str
    task_name: str
    started_at: float


class WorkerInfo(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a worker says about itself, stored as the shared value `worker/ID`."""

    id: str
    host: str
    pid: int
    queues: tuple[str, ...] = ()
    concurrency: int = 1
    """How many tasks the worker runs at once."""
    running: tuple[Running, ...] = ()
    """The longest-running tasks; their number is limited."""
    started_at: float = 0.0
    seen_at: float = 0.0
    """When the worker last reported. A worker that has been silent for long is gone."""
    version: str = ""
    """The release of qtasks that the worker runs."""
