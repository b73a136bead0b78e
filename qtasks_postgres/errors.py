"""Which errors of the server and the driver are final, and what to do about them.

All that is not listed here is taken for an outage, which passes: the call may be made again.
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

# By SQLSTATE, else by its class, the first two characters.
FINAL: Mapping[str, str] = {
    "28": LOGIN,  # the login is refused
    "3D000": "create the database, or name another in the URL",
    "42501": RIGHTS,
    "3F000": SCHEMA,  # no such schema
    "42P01": SCHEMA,  # no such table
    "42703": SCHEMA,  # no such column
}

# Only in the answer to a new connection.
FINAL_AT_START: Mapping[str, str] = {
    "42704": NO_OPTION,  # no such setting
    "22023": OPTION,  # no such value of it
    "55P02": OPTION,  # it can be set in the server's configuration only
}

# A connection pooler has one code for all that it has to say, so its words count.
FINAL_OF_A_POOLER: Mapping[str, str] = {
    "unsupported startup parameter": "leave it out of the URL, or name it in the pooler's"
    " ignore_startup_parameters",
    "no such database": "name the database in the pooler's configuration, or another in the URL",
    "no such user": LOGIN,
    "password authentication failed": LOGIN,
    "auth failed": LOGIN,
}

ELSEWHERE = ("25006", "08", "57P", "58", "XX")
"""The server is read-only, going down or broken: other connections to it are no better."""

NO_TLS = "rejected SSL upgrade"


def code_of(error: BaseException) -> str:
    """Return the SQLSTATE of a server's error, "" for others."""
    return str(getattr(error, "sqlstate", None) or "")


def leads_elsewhere(error: BaseException) -> bool:
    """Tell whether the server that answered so should be left, with all connections to it."""
    return code_of(error).startswith(ELSEWHERE)


def text_of(error: BaseException) -> str:
    """Return an error's words in one line, without details, which may quote what was stored."""
    if code_of(error) and error.args:
        return str(error.args[0])
    return " ".join(str(error).split())


@contextmanager
def translated(shown: str, within: float) -> Iterator[None]:
    """Turn what the driver raises into errors of the contracts; let all others pass.

    `within` are the seconds after which a silent server counts as unreachable.
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
        todo = advice(error)
        if todo is not None:
            raise ConfigurationError(f"{shown}: {what} ({todo})") from error
        raise Unavailable(f"{shown}: {what}") from error


@contextmanager
def translated_at_start(shown: str, within: float) -> Iterator[None]:
    """The same for a connection that is being made, when what the URL says may be wrong."""
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


def advice(error: BaseException) -> str | None:
    """Return what to do about an error that a retry does not cure; None: it may pass."""
    code = code_of(error)
    if code.startswith("08"):
        said = text_of(error)
        return next((todo for words, todo in FINAL_OF_A_POOLER.items() if words in said), None)
    return FINAL.get(code) or FINAL.get(code[:2])


def tls_advice(error: ssl.SSLError) -> str:
    """Return what to set so that TLS comes about."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            "set sslrootcert=FILE to the certificate of the authority that signed the server's, and"
            " the host in the URL to a name in that one"
        )
    return "check the files of sslrootcert, sslcert and sslkey, and what the server asks for"
