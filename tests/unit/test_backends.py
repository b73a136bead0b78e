"""What all backends have from the core, told in the same words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qtasks_core
from qtasks_core.drivers import importing_driver
from qtasks_core.errors import MissingDriver, NotSupported
from qtasks_core.transactions import refuse_transaction
from qtasks_memory import MemoryBroker, MemoryStorage

HOME = Path(qtasks_core.__file__).parents[1]


def test_a_missing_driver_is_one_line_that_names_the_extra() -> None:
    with pytest.raises(MissingDriver) as caught, importing_driver("shelf://", ".[shelf]"):
        import no_such_shelf  # type: ignore[import-not-found]  # noqa: F401
    assert str(caught.value) == "shelf:// needs its driver: pip install '.[shelf]' in the checkout"
    assert "no_such_shelf" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("part", "able"), [(MemoryBroker(), "PostgresBroker"), (MemoryStorage(), "PostgresStorage")]
)
def test_a_transaction_is_refused_by_name_of_what_can(
    part: MemoryBroker | MemoryStorage, able: str
) -> None:
    with pytest.raises(NotSupported, match=f"{type(part).__name__} cannot .* that can: {able}$"):
        refuse_transaction(part)


def test_loggers_are_of_one_hierarchy() -> None:
    """So that one setting of `qtasks` holds for all, and each backend can be set by its name."""
    loggers = re.compile(r"getLogger\((.*?)\)")
    for file in HOME.glob("qtasks_*/**/*.py"):
        backend = file.relative_to(HOME).parts[0].removeprefix("qtasks_")
        allowed = {'"qtasks"'} if backend in ("core", "conformance") else {f'"qtasks.{backend}"'}
        assert set(loggers.findall(file.read_text())) <= allowed, file
