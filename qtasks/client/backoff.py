"""`Backoff` lives in `qtasks.client.retrying`."""

from qtasks.client.retrying import Backoff

__all__ = ["Backoff"]
