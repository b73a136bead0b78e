"""A broker made of others, as the kit builds it in its processes."""

from __future__ import annotations

from qtasks.compose import RoutedBroker
from qtasks_core.lookup import resolve_broker


class Routed(RoutedBroker):
    """Has the queue `q`, which most tests use, and one more on another broker than the default."""

    def __init__(self, default: str, others: str, lease: float) -> None:
        one, other = (resolve_broker(f"{url}?lease={lease}") for url in (default, others))
        super().__init__(one, {"q": other, "held": other})
