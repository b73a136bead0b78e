"""`Outage` lives in `qtasks.client.retrying`."""

from qtasks.client.retrying import Outage

__all__ = ["Outage"]
