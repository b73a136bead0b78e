"""The requests of share groups, which the driver does not have: their versions and fields.

The names are those of Kafka's protocol guide (https://kafka.apache.org/protocol).
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from aiokafka.errors import IncompatibleBrokerVersion
from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import RequestStruct, Response
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactBytes,
    CompactString,
    Int8,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)

ACCEPT, RELEASE, RENEW = 1, 2, 4
"""How a record is acknowledged: finished, given back, or held for one more lease."""
GAP = 0
"""Acknowledges an offset of an acquired range that has no record for users."""
AT_MOST = 1
"""Acquire mode: never more records than the request asks for."""
TO_GROUP = 32
"""The type of a group among the resources that have a configuration."""

INVALID_RECORD_STATE = 121
"""Error: the record is not held by this share session."""
INVALID_REQUEST = 42
"""Error: nobody holds the record."""
INVALID_CONFIG = 40
UNKNOWN_MEMBERS = (25, 110)
"""Errors: the group has forgotten the member, or counts its epochs anew."""
NO_GROUP = 69
"""Error: there is no group of this name, or it is of another kind."""

_TEXT = CompactString("utf-8")
_TAGS = ("tags", TaggedFields)


class _Uuid(AbstractType):  # type: ignore[misc]
    """Sixteen bytes."""

    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: BytesIO) -> bytes:
        return data.read(16)


class _Optional:
    """A struct that may be absent: the byte before it tells."""

    def __init__(self, *fields: tuple[str, Any]) -> None:
        self._schema = Schema(*fields)

    def decode(self, data: BytesIO) -> Any:
        return self._schema.decode(data) if Int8.decode(data) >= 0 else None

    def repr(self, value: Any) -> str:
        return repr(value)


def _kind(name: str, key: int, version: int, fields: Schema, answer: Schema) -> Any:
    """Return the driver's class for a request, with the fields of the request and its answer."""
    numbers = {"API_KEY": key, "API_VERSION": version}
    answers = type(f"{name}Response", (Response,), {**numbers, "SCHEMA": answer})
    asks = {"FLEXIBLE_VERSION": True, "RESPONSE_TYPE": answers, "SCHEMA": fields}
    return type(name, (RequestStruct,), {**numbers, **asks})


class Call:
    """One request in the only version that is spoken here, as a connection of the driver sends it.

    Raises `IncompatibleBrokerVersion` if the server does not know it.
    """

    def __init__(self, kind: Any, *fields: Any) -> None:
        self._kind = kind
        self._request = kind(*fields, {})

    def prepare(self, versions: Mapping[int, tuple[int, int]]) -> Any:
        """Return the request for a server that speaks these versions."""
        least, most = versions.get(self._kind.API_KEY, (0, -1))
        if not least <= self._kind.API_VERSION <= most:
            raise IncompatibleBrokerVersion(
                f"it does not speak {self._kind.__name__} {self._kind.API_VERSION}: share groups "
                "with renewable locks need Kafka 4.2 with share.version=1, its default"
            )
        return self._request


_HEARTBEAT_ANSWER = Schema(
    ("throttle_time_ms", Int32),
    ("error_code", Int16),
    ("error_message", _TEXT),
    ("member_id", _TEXT),
    ("member_epoch", Int32),
    ("heartbeat_interval_ms", Int32),
    (
        "assignment",
        _Optional(
            (
                "partitions",
                CompactArray(("topic_id", _Uuid), ("partitions", CompactArray(Int32)), _TAGS),
            ),
            _TAGS,
        ),
    ),
    _TAGS,
)


Heartbeat = _kind(
    "Heartbeat", 76, 1,
    Schema(
        ("group_id", _TEXT),
        ("member_id", _TEXT),
        ("member_epoch", Int32),
        ("rack_id", _TEXT),
        ("subscribed_topic_names", CompactArray(_TEXT)),
        _TAGS,
    ),
    _HEARTBEAT_ANSWER,
)  # fmt: skip
"""Joins a group (epoch 0), stays in it, or leaves it (epoch -1)."""


_BATCHES = CompactArray(
    ("first_offset", Int64),
    ("last_offset", Int64),
    ("acknowledge_types", CompactArray(Int8)),
    _TAGS,
)
_TOPICS = CompactArray(
    ("topic_id", _Uuid),
    (
        "partitions",
        CompactArray(("partition", Int32), ("acknowledgement_batches", _BATCHES), _TAGS),
    ),
    _TAGS,
)
_LEADER = Schema(("leader_id", Int32), ("leader_epoch", Int32), _TAGS)
_NODES = CompactArray(("node_id", Int32), ("host", _TEXT), ("port", Int32), ("rack", _TEXT), _TAGS)


def _answer(*of_partition: tuple[str, Any]) -> Schema:
    """Return the schema of an answer that has an error for all and one for each partition."""
    partition = (
        ("partition", Int32),
        ("error_code", Int16),
        ("error_message", _TEXT),
        *of_partition,
        _TAGS,
    )
    return Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("error_message", _TEXT),
        ("acquisition_lock_timeout_ms", Int32),
        (
            "topics",
            CompactArray(("topic_id", _Uuid), ("partitions", CompactArray(*partition)), _TAGS),
        ),
        ("node_endpoints", _NODES),
        _TAGS,
    )


Fetch = _kind(
    "Fetch", 78, 2,
    Schema(
        ("group_id", _TEXT),
        ("member_id", _TEXT),
        ("session_epoch", Int32),
        ("max_wait_ms", Int32),
        ("min_bytes", Int32),
        ("max_bytes", Int32),
        ("max_records", Int32),
        ("batch_size", Int32),
        ("acquire_mode", Int8),
        ("is_renew_ack", Boolean),
        ("topics", _TOPICS),
        (
            "forgotten_topics",
            CompactArray(("topic_id", _Uuid), ("partitions", CompactArray(Int32)), _TAGS),
        ),
        _TAGS,
    ),
    _answer(
        ("acknowledge_error_code", Int16),
        ("acknowledge_error_message", _TEXT),
        ("current_leader", _LEADER),
        ("records", CompactBytes),
        (
            "acquired",
            CompactArray(
                ("first_offset", Int64), ("last_offset", Int64), ("delivery_count", Int16), _TAGS
            ),
        ),
    ),
)  # fmt: skip
"""Acquires records, and waits for them."""


Acknowledge = _kind(
    "Acknowledge", 79, 2,
    Schema(
        ("group_id", _TEXT),
        ("member_id", _TEXT),
        ("session_epoch", Int32),
        ("is_renew_ack", Boolean),
        ("topics", _TOPICS),
        _TAGS,
    ),
    _answer(("current_leader", _LEADER)),
)  # fmt: skip
"""Acknowledges acquired records, in any number and order."""


_METADATA_ANSWER = Schema(
    ("throttle_time_ms", Int32),
    ("brokers", _NODES),
    ("cluster_id", _TEXT),
    ("controller_id", Int32),
    (
        "topics",
        CompactArray(
            ("error_code", Int16),
            ("name", _TEXT),
            ("topic_id", _Uuid),
            ("is_internal", Boolean),
            (
                "partitions",
                CompactArray(
                    ("error_code", Int16),
                    ("partition", Int32),
                    ("leader", Int32),
                    ("leader_epoch", Int32),
                    ("replicas", CompactArray(Int32)),
                    ("in_sync_replicas", CompactArray(Int32)),
                    ("offline_replicas", CompactArray(Int32)),
                    _TAGS,
                ),
            ),
            ("authorized_operations", Int32),
            _TAGS,
        ),
    ),
    _TAGS,
)


Metadata = _kind(
    "Metadata", 3, 12,
    Schema(
        ("topics", CompactArray(("topic_id", _Uuid), ("name", _TEXT), _TAGS)),
        ("allow_auto_topic_creation", Boolean),
        ("include_authorized_operations", Boolean),
        _TAGS,
    ),
    _METADATA_ANSWER,
)  # fmt: skip
"""Asks for the ids of topics and the leaders of their partitions."""


_DESCRIBECONFIGS_ANSWER = Schema(
    ("throttle_time_ms", Int32),
    (
        "results",
        CompactArray(
            ("error_code", Int16),
            ("error_message", _TEXT),
            ("resource_type", Int8),
            ("resource_name", _TEXT),
            (
                "configs",
                CompactArray(
                    ("name", _TEXT),
                    ("value", _TEXT),
                    ("read_only", Boolean),
                    ("source", Int8),
                    ("is_sensitive", Boolean),
                    (
                        "synonyms",
                        CompactArray(("name", _TEXT), ("value", _TEXT), ("source", Int8), _TAGS),
                    ),
                    ("type", Int8),
                    ("documentation", _TEXT),
                    _TAGS,
                ),
            ),
            _TAGS,
        ),
    ),
    _TAGS,
)


DescribeConfigs = _kind(
    "DescribeConfigs", 32, 4,
    Schema(
        (
            "resources",
            CompactArray(
                ("resource_type", Int8),
                ("resource_name", _TEXT),
                ("configuration_keys", CompactArray(_TEXT)),
                _TAGS,
            ),
        ),
        ("include_synonyms", Boolean),
        ("include_documentation", Boolean),
        _TAGS,
    ),
    _DESCRIBECONFIGS_ANSWER,
)  # fmt: skip
"""Asks how a group is configured."""


_ALTERCONFIGS_ANSWER = Schema(
    ("throttle_time_ms", Int32),
    (
        "results",
        CompactArray(
            ("error_code", Int16),
            ("error_message", _TEXT),
            ("resource_type", Int8),
            ("resource_name", _TEXT),
            _TAGS,
        ),
    ),
    _TAGS,
)


AlterConfigs = _kind(
    "AlterConfigs", 44, 1,
    Schema(
        (
            "resources",
            CompactArray(
                ("resource_type", Int8),
                ("resource_name", _TEXT),
                (
                    "configs",
                    CompactArray(("name", _TEXT), ("operation", Int8), ("value", _TEXT), _TAGS),
                ),
                _TAGS,
            ),
        ),
        ("validate_only", Boolean),
        _TAGS,
    ),
    _ALTERCONFIGS_ANSWER,
)  # fmt: skip
"""Changes single settings of a group."""


_OFFSETS_ANSWER = Schema(
    ("throttle_time_ms", Int32),
    (
        "groups",
        CompactArray(
            ("group_id", _TEXT),
            (
                "topics",
                CompactArray(
                    ("name", _TEXT),
                    ("topic_id", _Uuid),
                    (
                        "partitions",
                        CompactArray(
                            ("partition", Int32),
                            ("start_offset", Int64),
                            ("leader_epoch", Int32),
                            ("lag", Int64),
                            ("error_code", Int16),
                            ("error_message", _TEXT),
                            _TAGS,
                        ),
                    ),
                    _TAGS,
                ),
            ),
            ("error_code", Int16),
            ("error_message", _TEXT),
            _TAGS,
        ),
    ),
    _TAGS,
)


Offsets = _kind(
    "Offsets", 90, 1,
    Schema(
        (
            "groups",
            CompactArray(
                ("group_id", _TEXT),
                (
                    "topics",
                    CompactArray(("name", _TEXT), ("partitions", CompactArray(Int32)), _TAGS),
                ),
                _TAGS,
            ),
        ),
        _TAGS,
    ),
    _OFFSETS_ANSWER,
)  # fmt: skip
"""Asks where a group stands, and how many records it has not finished."""


Describe = _kind(
    "Describe", 77, 1,
    Schema(("group_ids", CompactArray(_TEXT)), ("include_authorized_operations", Boolean), _TAGS),
    # The last fields are left out, so only one group can be asked for.
    Schema(
        ("throttle_time_ms", Int32),
        (
            "groups",
            CompactArray(
                ("error_code", Int16),
                ("error_message", _TEXT),
                ("group_id", _TEXT),
                ("state", _TEXT),
            ),
        ),
    ),
)  # fmt: skip
"""Asks for the state of one group."""
