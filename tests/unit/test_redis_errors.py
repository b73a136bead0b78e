"""What each error of a Redis server means, in the words of servers before and since version 7."""

from __future__ import annotations

import pytest
from redis import exceptions
from redis._parsers.base import BaseParser

from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_redis.errors import MEANINGS, Broken, Elsewhere, Meaning, meaning_of, raise_ours

OLD_SCRIPT = f"ERR Error running script (call to f_{'0' * 40}): @user_script:3: "

ANSWERS: list[tuple[str, Meaning]] = [
    ("CROSSSLOT Keys in request don't hash to the same slot", "wrong"),
    ("DENIED Redis is running in protected mode because protected mode is enabled", "wrong"),
    ("NOAUTH Authentication required.", "wrong"),
    ("WRONGPASS invalid username-password pair or user is disabled.", "wrong"),
    ("NOPERM this user has no permissions to run the 'get' command", "wrong"),
    ("NOPROTO unsupported protocol version", "wrong"),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", "wrong"),
    ("ERR DB index is out of range", "wrong"),
    ("ERR SELECT is not allowed in cluster mode", "wrong"),
    ("ERR unknown command 'XADD', with args beginning with: ", "wrong"),
    ("ERR unknown subcommand 'X'. Try CLIENT HELP.", "wrong"),
    ("ERR Unknown subcommand or wrong number of arguments for 'X'. Try CLIENT HELP.", "wrong"),
    ("ERR wrong number of arguments for 'get' command", "wrong"),
    ("ERR syntax error", "wrong"),
    ("ERR This instance has cluster support disabled", "wrong"),
    ("ERR ACL failure in script: No permissions to access a key script: 0, on @x:1.", "wrong"),
    (OLD_SCRIPT + "@user_script: 3: Unknown Redis command called from Lua script", "wrong"),
    (OLD_SCRIPT + "@user_script: 3: The user executing the script can't run this command", "wrong"),
    (OLD_SCRIPT + "WRONGTYPE Operation against a key holding the wrong kind of value", "wrong"),
    ("ASK 3999 127.0.0.1:6381", "elsewhere"),
    ("MOVED 3999 127.0.0.1:6381", "elsewhere"),
    ("CLUSTERDOWN Hash slot not served", "elsewhere"),
    ("LOADING Redis is loading the dataset in memory", "elsewhere"),
    ("MASTERDOWN Link with MASTER is down", "elsewhere"),
    ("READONLY You can't write against a read only replica.", "elsewhere"),
    ("READONLY You can't write. script: 0, on @user_script:1.", "elsewhere"),
    (OLD_SCRIPT + "@user_script: 3: -READONLY You can't write.", "elsewhere"),
    ("UNBLOCKED force unblock from blocking operation, instance state changed", "elsewhere"),
    ("BUSY Redis is busy running a script. You can only call SCRIPT KILL", "outage"),
    ("EXECABORT Transaction discarded because of previous errors.", "outage"),
    ("MISCONF Redis is configured to save RDB snapshots, but it's unable to persist", "outage"),
    (OLD_SCRIPT + "-MISCONF Errors writing to the AOF file: No space left on device", "outage"),
    ("NOREPLICAS Not enough good replicas to write.", "outage"),
    (OLD_SCRIPT + "-NOREPLICAS Not enough good replicas to write.", "outage"),
    ("OOM command not allowed when used memory > 'maxmemory'.", "outage"),
    (OLD_SCRIPT + "-OOM command not allowed when used memory > 'maxmemory'.", "outage"),
    ("TRYAGAIN Multiple keys request during rehashing of slot", "outage"),
    ("ERR max number of clients reached", "outage"),
    # Words of the table elsewhere than at the start mean nothing.
    ("ERR TASK is not known", "outage"),
    ("ERR the proxy asks later: ASK the operator, not MOVED, READONLY or NOPERM", "outage"),
    ("ERR internal failure after syntax error of a module, NOAUTH", "outage"),
    ("OOM command not allowed: LOADING", "outage"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "meaning"), ANSWERS)
def test_what_a_server_says(text: str, meaning: Meaning) -> None:
    error = BaseParser.parse_error(text)  # type: ignore[no-untyped-call]
    assert meaning_of(error) == meaning
    with pytest.raises((ConfigurationError, Unavailable)) as caught:
        raise_ours(error, "redis://h")
    kinds = {"wrong": ConfigurationError, "elsewhere": Elsewhere, "outage": Unavailable}
    assert type(caught.value) is kinds[meaning]
    assert str(caught.value).startswith("redis://h")


def test_every_code_word_has_an_example() -> None:
    assert set(MEANINGS) <= {text.partition(" ")[0] for text, _ in ANSWERS}


def test_a_forgotten_script_is_for_the_caller() -> None:
    error = BaseParser.parse_error("NOSCRIPT No matching script. Please use EVAL.")  # type: ignore[no-untyped-call]
    with pytest.raises(exceptions.NoScriptError):
        raise_ours(error, "redis://h")


@pytest.mark.parametrize(
    "error",
    [
        exceptions.ConnectionError("READONLY is the name of this host: no route"),
        exceptions.TimeoutError(),
        OSError("NOPERM"),
    ],
)
def test_what_no_server_said_is_an_outage(error: Exception) -> None:
    with pytest.raises(Unavailable) as caught:
        raise_ours(error, "redis://h")
    assert type(caught.value) is Unavailable


@pytest.mark.parametrize(
    "error",
    [
        IndexError("pop from an empty deque"),
        RuntimeError("the handler is closed"),
        ValueError("not enough values to unpack"),
        AttributeError("'NoneType' object has no attribute 'read'"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
)
def test_what_the_driver_does_not_expect_is_a_broken_connection(error: Exception) -> None:
    with pytest.raises(Broken, match=type(error).__name__) as caught:
        raise_ours(error, "redis://h")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [exceptions.DataError("invalid input"), "\ud800"],
    ids=["DataError", "UnicodeEncodeError"],
)
def test_a_wrong_argument_is_not_hidden(error: Exception | str) -> None:
    if isinstance(error, str):
        with pytest.raises(UnicodeEncodeError) as caught:
            error.encode()
        error = caught.value
    with pytest.raises(type(error)):
        raise_ours(error, "redis://h")
