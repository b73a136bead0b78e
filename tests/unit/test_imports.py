"""No two files import each other, by any way round; imports for types only count too."""

from __future__ import annotations

from graphlib import TopologicalSorter
from importlib.metadata import entry_points

import grimp
import pytest

PACKAGES = (
    "qtasks",
    "qtasks_conformance",
    "qtasks_core",
    "qtasks_log",
    *sorted(point.module.partition(".")[0] for point in entry_points(group="qtasks.backends")),
)


@pytest.mark.parametrize("package", dict.fromkeys(PACKAGES))
def test_imports_go_one_way(package: str) -> None:
    graph = grimp.build_graph(package)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imported).prepare()  # raises CycleError, which names the circle
