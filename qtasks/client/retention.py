"""How long records are kept: see `qtasks.client.times`."""

from qtasks.client.times import LEASES, kept_for

__all__ = ["LEASES", "kept_for"]
