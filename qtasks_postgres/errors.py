"""Tells which errors of the server and the driver are final, and what to do about them.

Every error that is not listed here counts as an outage. An outage passes, and the call may be
retried.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from qtasks_core.errors import ConfigurationError, QTasksError, Unavailable
from qtasks_postgres.options import OF_THE_DRIVER, OURS

LOGIN = "check the user and the password in the URL, and pg_hba.conf"
RIGHTS = (
    "the first start creates the schema qtasks: let a user start it who may CREATE in the database,"
    " or run `qtasks migrate` as one, and grant USAGE on the schema and rights on its tables to"
    " this one"
)
SCHEMA = "the schema qtasks was removed, or is another's; starting again creates what is missing"
NO_OPTION = (
    f"there are: {', '.join((*OURS, *OF_THE_DRIVER))}; any other name behind the ? of the URL has"
    " to be a setting of the server"
)
OPTION = "what the URL says behind the ? and the driver does not know is set at the server"

# Keys are SQLSTATEs, or their first two characters, which are the class.
FINAL: Mapping[str, str] = {
    "28": LOGIN,  # login refused
    "3D000": "create the database, or name another in the URL",
    "42501": RIGHTS,
    "3F000": SCHEMA,  # no such schema
    "42P01": SCHEMA,  # no such table
    "42703": SCHEMA,  # no such column
}

# These pass only if somebody does something about it.
PASSING: Mapping[str, str] = {
    "25006": "the URL leads to a replica: name the primary, or several hosts",
    "53100": "the server's disk is full: free some space",
    "53300": "raise max_connections, or put a connection pooler before the server",
}

# These apply only while a connection is being made.
FINAL_AT_START: Mapping[str, str] = {
    "42704": NO_OPTION,  # no such setting
    "22023": OPTION,  # no such value of a setting
    "55P02": OPTION,  # the setting belongs in the server's configuration only
}

# A connection pooler uses one code for all its errors, so the text decides.
FINAL_OF_A_POOLER: Mapping[str, str] = {
    "unsupported startup parameter": "leave it out of the URL, or name it in the pooler's"
    " ignore_startup_parameters",
    "no such database": "name the database in the pooler's configuration, or another in the URL",
    "no such user": LOGIN,
    "password authentication failed": LOGIN,
    "auth failed": LOGIN,
}

ELSEWHERE = ("25006", "08", "57P", "58", "XX")
"""The server is read-only, stopping or broken. Other connections to it are no better."""

NO_TLS = "rejected SSL upgrade"


def code_of(error: BaseException) -> str:
    """Return the SQLSTATE of a server's error, "" for other errors."""
    return str(getattr(error, "sqlstate", None) or "")


def leads_elsewhere(error: BaseException) -> bool:
    """Return whether this error means that all connections to the server should be dropped."""
    return code_of(error).startswith(ELSEWHERE)


def text_of(error: BaseException) -> str:
    """Return an error's text in one line. Details are left out, as they may quote stored data."""
    if code_of(error) and error.args:
        return str(error.args[0]).partition("\n")[0]
    return " ".join(str(error).split())


@contextmanager
def translated(shown: str, within: float) -> Iterator[None]:
    """Translate the driver's errors into those of the contracts. Others pass unchanged.

    `within` is the number of seconds after which a silent server counts as unreachable.
    """
    from asyncpg import InterfaceError, InternalClientError, PostgresError
    from asyncpg.exceptions import ClientConfigurationError

    try:
        yield
    except QTasksError:
        raise
    except ClientConfigurationError as error:
        raise ConfigurationError(f"{shown}: {text_of(error)}") from None
    except (PostgresError, InterfaceError, InternalClientError, OSError, EOFError) as error:
        what = text_of(error) or (
            f"no answer within {within:g} s"
            if isinstance(error, TimeoutError)
            else type(error).__name__
        )
        raise meaning_of(error, shown, what) from error


@contextmanager
def translated_at_start(shown: str, within: float) -> Iterator[None]:
    """Translate errors while a connection is being made, when the URL's options may be wrong."""
    from asyncpg import PostgresError

    with translated(shown, within):
        try:
            yield
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLEOFError | ssl.SSLSyscallError | ssl.SSLZeroReturnError):
                raise
            raise ConfigurationError(f"{shown}: {text_of(error)} ({tls_advice(error)})") from error
        except PostgresError as error:
            todo = FINAL_AT_START.get(code_of(error))
            if todo is None:
                raise
            raise ConfigurationError(f"{shown}: {text_of(error)} ({todo})") from None
        except ConnectionError as error:
            if NO_TLS not in str(error):
                raise
            raise ConfigurationError(
                f"{shown}: the server does not speak TLS (set sslmode=disable, or ssl = on in the"
                " server's configuration)"
            ) from error
        except ValueError as error:
            raise ConfigurationError(f"{shown}: {text_of(error)}") from None


def meaning_of(error: BaseException, shown: str, what: str = "") -> QTasksError:
    """Return what an error of a server or a driver means. `what` is its text in other words."""
    what = what or text_of(error)
    todo = advice(error)
    if todo is not None:
        return ConfigurationError(f"{shown}: {what} ({todo})")
    todo = PASSING.get(code_of(error))
    return Unavailable(f"{shown}: {what} ({todo})" if todo else f"{shown}: {what}")


def advice(error: BaseException) -> str | None:
    """Return advice for an error that a retry cannot fix, or None if it may pass."""
    code = code_of(error)
    if code.startswith("08"):
        said = text_of(error)
        return next((todo for words, todo in FINAL_OF_A_POOLER.items() if words in said), None)
    return FINAL.get(code) or FINAL.get(code[:2])


def tls_advice(error: ssl.SSLError) -> str:
    """Return the setting that makes TLS work."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            "set sslrootcert=FILE to the certificate of the authority that signed the server's, and"
            " the host in the URL to a name in that one"
        )
    return "check the files of sslrootcert, sslcert and sslkey, and what the server asks for"
