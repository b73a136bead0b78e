"""What is in the wheel."""

from __future__ import annotations

import tomllib
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.packaging.installed import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {path.parent.name for path in ROOT.glob("qtasks*/__init__.py")}


@pytest.fixture(scope="module")
def content(wheel: Path) -> dict[str, str]:
    """All text files of the wheel by their paths in it."""
    with ZipFile(wheel) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_the_packages_are_in_it_and_nothing_else(content: dict[str, str]) -> None:
    tops = {name.partition("/")[0] for name in content}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    modules = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in ROOT.glob(f"{package}/**/*.py")
    }
    assert {name for name in content if name.endswith(".py")} == modules


def test_every_package_is_typed(content: dict[str, str]) -> None:
    assert {name for name in content if name.endswith("/py.typed")} == {
        f"{package}/py.typed" for package in PACKAGES
    }


def metadata(content: dict[str, str], file: str) -> str:
    (found,) = (text for name, text in content.items() if name.endswith(f".dist-info/{file}"))
    return found


def test_licence_readme_and_entry_points_go_with_it(content: dict[str, str]) -> None:
    assert metadata(content, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    about = metadata(content, "METADATA")
    assert "License-Expression: MIT" in about
    assert (ROOT / "README.md").read_text() in about
    points = ConfigParser()
    points.read_string(metadata(content, "entry_points.txt"))
    assert dict(points["qtasks.backends"]) == PROJECT["project"]["entry-points"]["qtasks.backends"]
