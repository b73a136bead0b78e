"""Contracts, schemas, wire format, errors and backend look-up: everything that a backend needs."""

from qtasks_core.contracts.backend import CONTRACT_VERSION, Backend
from qtasks_core.contracts.balancer import Balancer
from qtasks_core.contracts.broker import Broker
from qtasks_core.contracts.composition import Composition
from qtasks_core.contracts.executor import Encoded, Executor, Runnable
from qtasks_core.contracts.inbox import Inbox
from qtasks_core.contracts.plugin import Plugin
from qtasks_core.contracts.reviewed import ReviewedMigration
from qtasks_core.contracts.route_policy import RoutePolicy
from qtasks_core.contracts.serializer import Serializer
from qtasks_core.contracts.storage import Storage
from qtasks_core.contracts.subscription import Subscription
from qtasks_core.distribution import refuse_other_package
from qtasks_core.schemas import (
    DONE,
    LOST,
    Ack,
    Claim,
    Command,
    Completion,
    Delivery,
    Guarantees,
    Outcome,
    QueueDepth,
    Raw,
    Release,
    Retry,
    Running,
    Settlement,
    Status,
    Task,
    TaskMessage,
    TaskPage,
    TaskQuery,
    Verdict,
    WorkerInfo,
)

__all__ = [
    "CONTRACT_VERSION",
    "DONE",
    "LOST",
    "Ack",
    "Backend",
    "Balancer",
    "Broker",
    "Claim",
    "Command",
    "Completion",
    "Composition",
    "Delivery",
    "Encoded",
    "Executor",
    "Guarantees",
    "Inbox",
    "Outcome",
    "Plugin",
    "QueueDepth",
    "Raw",
    "Release",
    "Retry",
    "ReviewedMigration",
    "RoutePolicy",
    "Runnable",
    "Running",
    "Serializer",
    "Settlement",
    "Status",
    "Storage",
    "Subscription",
    "Task",
    "TaskMessage",
    "TaskPage",
    "TaskQuery",
    "Verdict",
    "WorkerInfo",
]

refuse_other_package()
