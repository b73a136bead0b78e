"""Why a test has no server."""


class Unobtainable(Exception):
    """The server cannot be had on this machine. The text says what would help."""


class NotReady(Exception):
    """The server was started and does not answer."""
