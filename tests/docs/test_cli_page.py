"""The commands of `docs/cli.md`, run in order; where the page has `…`, anything may stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from qtasks.asyncio import QueueTasks
from tests.docs.test_code_blocks import blocks_of, run
from tests.processes import ROOT, Process, until

PAGE = ROOT / "docs" / "cli.md"
END = "@@end"


class Line(NamedTuple):
    command: str
    output: str

    @property
    def works(self) -> bool:
        """Whether it is a worker, which does not end by itself."""
        return " run" in self.command

    @property
    def promise(self) -> str:
        """The pattern that the output has to fit."""
        return ".*".join(re.escape(part) for part in self.output.strip().split("…"))

    def fits(self, said: str) -> bool:
        """Tell whether this is what the page promises, and nothing else."""
        return re.fullmatch(self.promise, said.strip(), re.DOTALL) is not None

    def begins(self, said: str) -> bool:
        """Tell whether a worker has said by now what the page promises."""
        return re.match(self.promise, said, re.DOTALL) is not None


def lines_of(page: Path) -> list[Line]:
    blocks = re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    found = [re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE) for block in blocks]
    return [Line(*line) for block in found for line in block]


def test_the_commands_do_what_the_page_says(tmp_path: Path) -> None:
    (app,) = [block for block in blocks_of(PAGE) if block.file]
    (tmp_path / app.file).write_text(app.code)
    script = tmp_path / "bin" / "qtasks"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m qtasks "$@"\n')
    script.chmod(0o755)
    environment = {
        "PATH": f"{script.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "QTASKS_BROKER_URL": f"sqlite:///{tmp_path}/qtasks.db",
    }
    lines = lines_of(PAGE)
    with ExitStack() as stack:
        workers = []
        for line in lines:
            if line.works:
                arguments = line.command.split()[1:]
                worker = Process("-m", "qtasks", *arguments, environment=environment, cwd=tmp_path)
                workers.append(stack.enter_context(worker))
                until(lambda: line.begins(worker.output()), line.output)  # noqa: B023
        compare([line for line in lines if not line.works], environment, tmp_path)
        for worker in workers:
            assert worker.terminate() == 0


def compare(lines: list[Line], environment: dict[str, str], cwd: Path) -> None:
    """Run the lines in one shell; each ends well and says what stands below it."""
    script = "exec 2>&1\n" + "".join(f"{line.command}\necho {END} $?\n" for line in lines)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = re.split(rf"{END} (\d+)\n", done.stdout)
    for line, output, status in zip(lines, said[::2], said[1::2], strict=False):
        assert status == "0", f"{line.command}: {output}"
        assert line.fits(output), f"{line.command}\nsaid {output}\nnot {line.output}"
    assert len(said) == 2 * len(lines) + 1


def test_a_line_that_says_something_else_does_not_fit() -> None:
    assert Line("", "a … c").fits("a b c")
    for said in ("a b", "a b c d", "b a b c", ""):
        assert not Line("", "a … c").fits(said)


async def test_the_python_of_the_page() -> None:
    app = QueueTasks("docs-cli", "memory://")

    @app.task()
    async def divide(x: int, y: int) -> float:
        return x / y

    names: dict[str, object] = {"app": app, "__name__": "docs"}
    (block,) = [block for block in blocks_of(PAGE) if not block.file]
    async with app:
        async with app.worker():
            failed = await divide.add_task(1, 0, timeout=120)
        await run(block, names)
        assert [task.uuid for task in names["page"].tasks] == [failed.uuid]  # type: ignore[attr-defined]
