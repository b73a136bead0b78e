"""What goes wrong before a command can do its work: one clear line, no password, an exit code."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.processes import ROOT, until

NO_MODULE = (
    "there is no module %r on Python's path; "
    "write it as for an import, package.module, in the folder above it"
)


@pytest.mark.parametrize(
    ("app", "message"),
    [
        ("nowhere:app", f"qtasks: -A nowhere: {NO_MODULE % 'nowhere'}"),
        ("tests/cli/shop.py:app", f"qtasks: -A tests/cli/shop.py: {NO_MODULE % 'tests/cli/shop'}"),
        (
            "tests.cli.nowhere:app",
            f"qtasks: -A tests.cli.nowhere: {NO_MODULE % 'tests.cli.nowhere'}",
        ),
        (
            "tests.cli.shop:nothing",
            "qtasks: -A tests.cli.shop:nothing: that does not name an app; "
            "write tests.cli.shop:app",
        ),
        (
            "tests.cli.shop",
            "qtasks: -A tests.cli.shop: that does not name an app; write tests.cli.shop:app",
        ),
    ],
)
@pytest.mark.parametrize("command", ["run", "queues"])
def test_a_wrong_path_of_the_app(qtasks: Command, command: str, app: str, message: str) -> None:
    said = qtasks(command, app=app)
    assert (said.code, said.out, said.error) == (2, "", message)


def test_a_module_that_cannot_be_imported_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\nx / 0\n")
    said = Command({}, tmp_path)("queues", app="broken:app")
    assert said.code == 2
    where = f"{tmp_path}/broken.py:2"
    assert said.error == f"qtasks: -A broken: ZeroDivisionError: division by zero ({where})"


@pytest.mark.parametrize("app", ["", ":app", ".shop:app"])
def test_a_path_without_a_module(qtasks: Command, app: str) -> None:
    said = qtasks("-A", app, "queues", app=None)
    name = app.partition(":")[0]
    assert (said.code, said.out) == (2, "")
    assert said.error == (
        f"qtasks: -A {name!r}: that names no module; write it as for an import, package.module"
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = (\n", "SyntaxError: '(' was never closed (broken.py, line 1)"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3 ({file}:2)"),
        (
            "from qtasks.asyncio import QueueTasks\ndef made():\n"
            "    return QueueTasks(broker='foo://x')\napp = made()\n",
            "no backend for foo:// is installed; there are: amqp, amqps, kafka, kafka+share, "
            "kafka+transactional, memory, postgres, postgresql, redis, redis+cluster, "
            "redis+sentinel, rediss, rediss+cluster, rediss+sentinel, sqlite, valkey ({file}:4)",
        ),
    ],
)
def test_the_line_is_the_module_s_own(tmp_path: Path, code: str, message: str) -> None:
    """And none of the import's, nor of ours, whose messages need no name of a class."""
    (tmp_path / "broken.py").write_text(code)
    said = Command({}, tmp_path)("queues", app="broken:app")
    assert said.code == 2
    assert said.error == f"qtasks: -A broken: {message.format(file=tmp_path / 'broken.py')}"


def test_the_environment_names_the_app_as_well() -> None:
    said = Command({"QTASKS_APP": "nowhere:app"})("queues", app=None)
    assert said.code == 2
    assert said.error == f"qtasks: QTASKS_APP nowhere: {NO_MODULE % 'nowhere'}"


def test_a_module_that_lacks_another_is_not_taken_for_a_wrong_path(tmp_path: Path) -> None:
    (tmp_path / "lacking.py").write_text("import nowhere\n")
    said = Command({}, tmp_path)("queues", app="lacking:app")
    assert said.error == (
        "qtasks: -A lacking: ModuleNotFoundError: No module named 'nowhere' "
        f"({tmp_path}/lacking.py:1)"
    )


@pytest.mark.parametrize("command", [("run",), ("dead", "list")])
@pytest.mark.parametrize(
    ("option", "value", "written"),
    [
        ("-A", "tests.cli.shop:app", "MODULE:APP"),
        ("-b", "redis://h", "URL"),
        ("--log-level", "info", "LEVEL"),
    ],
)
def test_the_app_behind_the_command(
    qtasks: Command, command: tuple[str, ...], option: str, value: str, written: str
) -> None:
    said = qtasks(*command, option, value, app=None)
    assert said.code == 2
    right = f"qtasks {option} {written} {' '.join(command)}"
    assert said.err.splitlines()[-1] == f"Error: write {option} before the command: {right}"


def test_the_broker_of_the_command_line(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/other.db"
    away = Command({"QTASKS_BROKER_URL": "redis://:hidden@127.0.0.1:1/0"})
    assert "other.db" in away("-b", url, "tasks", app=None).error
    assert away.ok("-b", url, "-A", "tests.cli.shop:app", "call", "add", "1", "2", app=None).line
    (tmp_path / "own.py").write_text(
        "from qtasks.asyncio import QueueTasks\napp = QueueTasks(broker='memory://own')\n"
    )
    said = Command({}, tmp_path)("-b", "redis://me:hidden@h", "-A", "own:app", "tasks", app=None)
    assert (said.code, said.out) == (2, "")
    assert said.error == (
        "qtasks: -b redis://me:***@h: the app 'qtasks' sets its broker in its code, memory://own; "
        "leave out -b, or remove the broker from the code"
    )


@pytest.mark.parametrize(
    "url",
    [
        "memory://x?foo=1&lease=3",
        "sqlite:////x.db?foo=hidden",
        "redis://127.0.0.1:1/0?socket_timeout=2&foo=hidden",
        "rediss://127.0.0.1:1/0?ssl_cert_reqs=none&foo=hidden",
        "valkey://127.0.0.1:1/0?lease=2&foo=hidden",
    ],
)
def test_an_option_of_a_url_that_does_not_exist(url: str) -> None:
    said = Command({"QTASKS_BROKER_URL": url})("queues", app=None)
    assert (said.code, said.out) == (2, "")
    assert "there is no option 'foo'; there are: lease, " in said.error
    assert "hidden" not in said.error


def test_the_level_of_the_log(qtasks: Command) -> None:
    with qtasks.run("--log-level", "error", before=True) as worker:
        until(lambda: bool(qtasks.ok("workers", "--json").rows), "a worker")
        assert worker.terminate() == 0
        assert worker.output() == ""
    with qtasks.run("--log-level", "debug", before=True) as worker:
        worker.wait_for("knows add")
        assert worker.terminate() == 0


def test_the_version_is_that_of_this_project(qtasks: Command) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert qtasks.ok("--version", app=None).line == f"qtasks, version {project['version']}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_shells(shell: str) -> None:
    script = Command({"_QTASKS_COMPLETE": f"{shell}_source"})(app=None).out
    assert f"_QTASKS_COMPLETE={shell}_complete" in script
    words = {"COMP_WORDS": "qtasks dead re", "COMP_CWORD": "2"}
    done = Command({"_QTASKS_COMPLETE": "bash_complete", **words})(app=None)
    assert done.out.strip() == "plain,revive"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hidden@127.0.0.1:1/0",
        "postgresql://me:hidden@127.0.0.1:1/x",
        "amqp://me:hidden@127.0.0.1:1",
        "kafka://127.0.0.1:1",
    ],
)
@pytest.mark.parametrize("arguments", [("queues",), ("call", "add", "1", "2")])
def test_a_server_out_of_reach(url: str, arguments: tuple[str, ...]) -> None:
    said = Command({"QTASKS_BROKER_URL": url})(*arguments)
    assert (said.code, said.out) == (3, "")
    assert "127.0.0.1" in said.error
    assert "hidden" not in said.error


def test_a_worker_without_tasks_would_put_back_all_it_gets(qtasks: Command) -> None:
    said = qtasks("run", app=None)
    assert (said.code, said.out) == (2, "")
    assert said.error.startswith("qtasks: the app has no tasks to run")


def test_a_time_that_is_none(qtasks: Command) -> None:
    said = qtasks("tasks", "--after", "soon")
    assert said.code == 2
    assert "'soon' is not a time like 2030-01-31T12:00" in said.err


def test_bytes_that_are_no_text(qtasks: Command) -> None:
    said = qtasks("tasks", "--name", "\udcff")
    assert (said.code, said.out) == (2, "")
    assert said.error == r"Error: '\udcff' is not UTF-8 text"


def test_a_scheme_that_nobody_serves() -> None:
    said = Command({"QTASKS_BROKER_URL": "foo://me:hidden@host"})("queues", app=None)
    assert said.code == 2
    assert said.error.startswith("qtasks: no backend for foo:// is installed; there are: amqp,")


def test_a_directory_that_is_not_there() -> None:
    said = Command({"QTASKS_BROKER_URL": "sqlite:////nowhere/qtasks.db"})("queues", app=None)
    assert (said.code, said.error) == (2, "qtasks: /nowhere is not a directory: create it first")


@pytest.mark.parametrize("command", [("queues",), ("run", "--include", "tests.cli.shop")])
def test_an_embedded_default_that_cannot_be(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("no directory")
    said = Command({"XDG_DATA_HOME": str(tmp_path / "file")})(*command, app=None)
    assert (said.code, said.out) == (2, "")
    assert said.error == (
        f"qtasks: no place for the embedded default ([Errno 20] Not a directory: "
        f"'{tmp_path}/file/qtasks'): set QTASKS_BROKER_URL, or XDG_DATA_HOME to a directory that "
        "can be written"
    )


def test_the_embedded_default_says_where_it_is(tmp_path: Path) -> None:
    said = Command({"XDG_DATA_HOME": str(tmp_path)})("guarantees", "--json", app=None)
    assert said.code == 0
    assert said.json["broker"]["part"] == "SqliteBroker"
    where = f"using the embedded default, sqlite:///{tmp_path}/qtasks/qtasks.db"
    assert said.told["message"].endswith(where)
    assert Command({"XDG_DATA_HOME": str(tmp_path)})("queues", app=None).error.endswith(where)


def test_an_error_on_the_embedded_default_is_one_document(tmp_path: Path) -> None:
    said = Command({"XDG_DATA_HOME": str(tmp_path)})("call", "nope", "--json", app=None)
    assert (said.code, said.out) == (2, "")
    assert said.told["error"].startswith("no task 'nope'")
    (line,) = said.told["log"]
    assert line.endswith(f"using the embedded default, sqlite:///{tmp_path}/qtasks/qtasks.db")
