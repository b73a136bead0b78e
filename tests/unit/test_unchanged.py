"""Tests of tests are left out only as long as what they look at is what they have passed on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import unchanged


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a folder and a page that one test looks at, which has passed."""
    (tmp_path / "kit" / "inner").mkdir(parents=True)
    (tmp_path / "kit" / "inner" / "one.py").write_text("1")
    (tmp_path / "page.md").write_text("page")
    monkeypatch.setattr(unchanged, "ROOT", tmp_path)
    monkeypatch.setattr(unchanged, "NOTED", tmp_path / "noted.json")
    monkeypatch.setattr(unchanged, "LOOK_AT", {"test": ("kit", "page.md")})
    assert list(unchanged.changed()) == ["test"]
    (tmp_path / "noted.json").write_text(json.dumps({"test": unchanged.digest(("kit", "page.md"))}))
    return tmp_path


def test_what_it_does_not_look_at(folder: Path) -> None:
    (folder / "other.md").write_text("another page")
    assert list(unchanged.changed()) == []


@pytest.mark.parametrize("path", ["kit/inner/one.py", "kit/two.py", "page.md"])
def test_what_it_looks_at(folder: Path, path: str) -> None:
    (folder / path).write_text("changed")
    assert list(unchanged.changed()) == ["test"]


def test_what_is_renamed_or_gone(folder: Path) -> None:
    moved = (folder / "kit" / "inner" / "one.py").rename(folder / "kit" / "inner" / "two.py")
    assert list(unchanged.changed()) == ["test"]
    moved.unlink()
    assert list(unchanged.changed()) == ["test"]


def test_each_place_exists() -> None:
    for tests, places in unchanged.LOOK_AT.items():
        assert [place for place in (tests, *places) if not (unchanged.ROOT / place).exists()] == []
