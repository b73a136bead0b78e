"""The commands in the README and the docs exist, with the options that are given to them.

Read are the blocks of shell (```sh, ```console and indented ones) and commands between backticks.
Some are run as well: those of `cli.md` by `test_cli_page.py`, the README's two and what `pip`
installs by `tests/packaging`, the benchmarks, briefly, and `make demo` here. `make test` runs this,
and `make peers` installs other task queues.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from qtasks.cli.main import qtasks
from tests.docs.test_code_blocks import PAGES
from tests.processes import ROOT

OF_OTHERS = {"celery", "curl", "pytest", "uvicorn"}
"""Programs whose options are their own."""
OURS = ("qtasks", "python", "python3", "make", "pip", "export")


class Command(NamedTuple):
    page: Path
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """Its words, without a comment and what comes behind a pipe.

        Where another command stands inside, `UUID=$(qtasks call …)`, that one is taken.
        """
        inside = re.search(r"\$\((.*)\)", self.text)
        words = shlex.split(inside[1] if inside else self.text, comments=True)
        ends = [at for at, word in enumerate(words) if word in ("||", "|", "&&", ";")]
        return words[: ends[0]] if ends else words


def commands_of(page: Path) -> list[Command]:
    text = page.read_text()
    found = []
    language = None
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            language = None if language is not None else line.strip("`")
        elif language == "sh" and line.strip():
            found.append(Command(page, number, line))
        elif language == "console" and line.startswith("$ "):
            found.append(Command(page, number, line[2:]))
        elif language is None:
            if re.match(r"    \S", line) and line.split()[0] in (*OURS, *OF_OTHERS):
                found.append(Command(page, number, line))
            inline = re.findall(r"`((?:qtasks|make|python -m) [^`…]+)`", line)
            found += [Command(page, number, text) for text in inline]
    return found


COMMANDS = [command for page in PAGES for command in commands_of(page)]


def name_of(command: Command) -> str:
    return f"{command.page.name}:{command.line}"


def test_there_are_some() -> None:
    programs = {command.words[0] for command in COMMANDS}
    assert programs >= {*OURS}


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_it_exists(command: Command) -> None:
    program, *arguments = command.words
    known = CHECKS.get(program)
    assert known or program in OF_OTHERS, f"{program}: unknown"
    if known:
        known(arguments)


def check_qtasks(arguments: list[str]) -> None:
    """Have the command line parse it; raises where a command or an option does not exist."""
    parse(qtasks, arguments)


def parse(
    command: click.Command, arguments: list[str], parent: click.Context | None = None
) -> None:
    context = click.Context(command, parent, info_name=command.name, **command.context_settings)
    _, rest, _ = command.make_parser(context).parse_args(list(arguments))
    if isinstance(command, click.Group) and rest:
        below = command.get_command(context, rest[0])
        assert below is not None, f"qtasks has no command {rest[0]}"
        parse(below, rest[1:], context)


def check_python(arguments: list[str]) -> None:
    """Check the modules of the benchmarks and their options."""
    if arguments[:1] != ["-m"] or not arguments[1].startswith(("benchmarks.", "qtasks", "tests.")):
        return
    if arguments[1] == "qtasks":
        check_qtasks(arguments[2:])
        return
    if not arguments[1].startswith("benchmarks."):
        assert (ROOT / arguments[1].replace(".", "/")).with_suffix(".py").exists() or (
            ROOT / arguments[1].replace(".", "/")
        ).is_dir()
        return
    said = help_of(arguments[1])
    given = re.findall(r"(--[a-z-]+)", " ".join(arguments[2:]))
    assert [option for option in given if option not in said] == []


@cache
def help_of(module: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip


def check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    given = [argument for argument in arguments if "=" not in argument]
    assert [target for target in given if target not in targets] == []


def check_pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = re.findall(r"qtasks\[([a-z,]+)\]", " ".join(arguments))
    extras = [extra for group in asked for extra in group.split(",")]
    assert [extra for extra in extras if extra not in project["optional-dependencies"]] == []


def check_export(arguments: list[str]) -> None:
    """Every variable of ours is one that the code reads."""
    code = "".join(path.read_text() for path in (ROOT / "qtasks").rglob("*.py"))
    names = [argument.partition("=")[0] for argument in arguments]
    ours = [name for name in names if name.startswith("QTASKS_")]
    assert [name for name in ours if f'"{name}"' not in code] == []


CHECKS = {
    "qtasks": check_qtasks,
    "python": check_python,
    "python3": check_python,
    "make": check_make,
    "pip": check_pip,
    "export": check_export,
}


@pytest.mark.parametrize(
    "text",
    ["qtasks worker", "qtasks run --pool 4", "qtasks dead bury", "make coffee", "export QTASKS_X=1",
     "pip install 'qtasks[mongo]'", "python -m benchmarks.throughput --loud"],
)  # fmt: skip
def test_what_does_not_exist_is_found(text: str) -> None:
    command = Command(ROOT, 1, text)
    with pytest.raises((AssertionError, click.UsageError)):
        test_it_exists(command)


BRIEFLY = {
    "throughput": ["--tasks", "500"],
    "profile": ["--tasks", "500"],
    "io_thread": ["--tasks", "200", "--rounds", "1"],
    "scaling": ["--tasks", "40"],
    "memory": ["--tasks", "2000"],
    "idle": ["--seconds", "1"],
    "churn": ["--tasks", "5000"],
    "log_start": ["--tasks", "500"],
    "chaos": ["--tasks", "300"],
}
"""Options that make a benchmark short; they come behind those of the page."""
BENCHMARKS = [command for command in COMMANDS if command.text.startswith("python -m benchmarks.")]


@pytest.mark.parametrize("command", BENCHMARKS, ids=name_of)
def test_a_benchmark_runs(command: Command) -> None:
    _, *arguments = command.words
    done = python(*arguments, *BRIEFLY[arguments[1].removeprefix("benchmarks.")])
    if "py-spy" in command.text and find_spec("py_spy") is None:
        assert (done.returncode, done.stderr) == (
            1,
            "py-spy is not installed: pip install py-spy\n",
        )
    else:
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_demo_runs() -> None:
    """By the command that `make demo` runs in its environment."""
    recipe = re.search(
        r"^demo:.*\n\t\$\(RUN\) (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert recipe
    done = python(*recipe[1].split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('-> {"result":3}') == 3


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
