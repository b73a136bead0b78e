"""`only_from_outside` is `no_stray_cancel` of `qtasks.client.retrying`."""

from qtasks.client.retrying import no_stray_cancel as only_from_outside

__all__ = ["only_from_outside"]
