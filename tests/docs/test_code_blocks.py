"""The Python blocks of the README and the docs.

Each compiles, with `await` as in a coroutine. Beyond that a block is one of three:

- its first line is a comment that names one of the example's files: it is that file;
- its first line is a comment that names another file: it is a program of its own, run as it says;
- else it goes on where the block before it on its page ended: a page's blocks run as one coroutine.

Another library's code, for comparison, stands in a block called `py`, which only compiles.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import socket
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.request import urlopen

import pytest
from httpx import ASGITransport, AsyncClient

from qtasks.asyncio import QueueTasks
from tests.processes import ROOT, Process, until

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = ROOT / "examples" / "fastapi_shop" / "shop"


class Block(NamedTuple):
    page: Path
    line: int
    code: str

    @property
    def file(self) -> str:
        """The file that its first line names, "" where it names none."""
        named = re.match(r"# (\w+\.py)\b", self.code)
        return named[1] if named else ""

    def compiled(self) -> Any:
        """Return its code; blank lines before it make errors name the line of the page."""
        code = "\n" * self.line + self.code
        # Without what this module imports from __future__: a reader has that not either.
        return compile(code, self.page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


def blocks_of(page: Path, language: str = "python") -> list[Block]:
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text[: match.start()].count("\n") + 1, match[1]) for match in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
OF_OTHERS = [block for page in PAGES for block in blocks_of(page, "py")]


def name_of(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


@pytest.mark.parametrize("block", [*BLOCKS, *OF_OTHERS], ids=name_of)
def test_it_compiles(block: Block) -> None:
    assert block.compiled()


def of_the_example(block: Block) -> bool:
    return bool(block.file) and (EXAMPLE / block.file).exists()


@pytest.mark.parametrize("block", [b for b in BLOCKS if of_the_example(b)], ids=name_of)
def test_it_is_a_file_of_the_example(block: Block) -> None:
    """Which other tests run. Comments and lines between groups of imports may differ."""
    file = (EXAMPLE / block.file).read_text()
    assert ast.unparse(ast.parse(block.code)) == ast.unparse(ast.parse(file))


async def test_the_first_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's blocks in order; here is what the page leaves to its reader."""
    monkeypatch.setenv("QTASKS_BROKER_URL", "memory://docs")

    async def server_is_busy() -> bool:
        return False

    async def deliver(address: str, text: str) -> int:
        return len(text)

    names: dict[str, Any] = {
        "server_is_busy": server_is_busy,
        "deliver": deliver,
        "__name__": "docs",
    }
    declared, words, *rest = [b for b in blocks_of(ROOT / "docs" / "first-task.md") if not b.file]
    await run(declared, names)
    await run(words, names)
    async with names["app"].worker():
        for block in rest:
            await run(block, names)
        assert (await names["words"].add_task("a b", timeout=120)).returning == ["A", "B"]
        assert names["done"].returning == len("hello")
        assert names["order"].uuid == names["again"].uuid == names["sent"].uuid
        ended = [await task.wait_result(120) for task in names["tasks"]]
        assert [task.returning for task in ended] == [2, 2]
        assert names["later"].status == "scheduled"


async def run(block: Block, names: dict[str, Any]) -> None:
    """Run a block as a part of a coroutine that has these names."""
    ended = eval(block.compiled(), names)  # noqa: S307  # our own pages
    if inspect.iscoroutine(ended):
        await ended


async def test_the_faces() -> None:
    names: dict[str, Any] = {"__name__": "docs"}
    for block in [b for b in blocks_of(ROOT / "docs" / "faces.md") if not b.file]:
        await run(block, names)
        if "get_sum" in block.code:
            first = names["api"]
    assert names["done"].returning == 3
    async with names["shop"].worker():
        assert await asyncio.to_thread(names["receipt"]) == "4.00"
    async with (
        names["app"].worker(),
        AsyncClient(transport=ASGITransport(first), base_url="http://docs") as client,
    ):
        assert (await client.get("/sum", params={"x": 2, "y": 3})).json() == 5
    api = names["api"]
    async with api.router.lifespan_context(api) as state:
        assert state == {"greeting": "hello"}
        assert names["app"].client


async def test_what_may_be_passed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ModuleType("docs")
    monkeypatch.setitem(sys.modules, "docs", page)  # where a dataclass looks for its types
    for block in blocks_of(ROOT / "docs" / "types.md"):
        await run(block, vars(page))
    refused, dead, error = capsys.readouterr().out.splitlines()
    assert "argument 'note': a docs.Line would not come back as it is" in refused
    assert dead == "bad arguments"
    assert error.endswith("argument 'lines': Expected `int`, got `str` - at `$[0].pieces`")


async def test_choosing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks_of(ROOT / "docs" / "choosing.md"):
        await run(block, names)
    told = [[type(part).__name__ for part in (app.broker, app.storage)]
            for app in (names["both"], names["pair"], names["parts"])]  # fmt: skip
    assert told == [["SqliteBroker", "SqliteStorage"], *[["SqliteBroker", "MemoryStorage"]] * 2]


async def test_delivery() -> None:
    app = QueueTasks("docs-delivery", "memory://")

    @app.task()
    async def remind(text: str) -> None:
        raise AssertionError("an hour too early")

    names: dict[str, Any] = {"remind": remind, "__name__": "docs"}
    async with app.worker():
        for block in [b for b in blocks_of(ROOT / "docs" / "delivery.md") if not b.file]:
            await run(block, names)
        assert names["later"].status == "scheduled"


async def test_balancing() -> None:
    names: dict[str, Any] = {"__name__": "docs"}
    blocks = blocks_of(ROOT / "docs" / "balancing.md")
    for block in blocks:
        await run(block, names)
    assert max(len(block.code.splitlines()) for block in blocks) < 40
    assert names["AtMost"]({"free": 2}).wanted(9, {"free": 2, "paid": 0}) == {"paid": 9}
    served: list[str] = names["served"]
    async with names["app"]:
        queues = Counter[str]()
        for tenant, pages in (("big", 200), ("small", 10)):
            for page in range(pages):
                queues[(await names["print_out"].add_task(tenant, page)).queue] += 1
        assert [*queues.values()] == [200, 10]
        assert (await names["bind"].add_task("big")).queue == "small"
        assert (await names["bind"].add_task("big", pages=101)).queue == "large"
        async with names["worker"], asyncio.timeout(120):
            while len(served) < 210:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert served.index("small") < 20
    assert served[:40].count("small") == 10
    async with names["fair"], names["gentle"]:
        pass


async def test_coming_from_celery(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's QTasks half; `fetch`, `shrink` and `store` are its reader's."""
    monkeypatch.setenv("QTASKS_BROKER_URL", "memory://docs-celery")
    declared, used = blocks_of(ROOT / "docs" / "celery.md")
    names: dict[str, Any] = {
        "fetch": lambda picture: f"picture {picture}",
        "shrink": lambda picture, width: f"{picture}, {width} wide",
        "store": lambda picture: picture,
        "__name__": "docs",
    }
    await run(declared, names)
    async with names["app"].worker():
        await asyncio.to_thread(eval, used.compiled(), names)
    assert capsys.readouterr().out == "picture 17, 200 wide\n"


def test_the_worker_that_follows_celery_s(tmp_path: Path) -> None:
    page = ROOT / "docs" / "celery.md"
    (tmp_path / "shop.py").write_text(blocks_of(page)[0].code)
    (command,) = [line for line in blocks_of(page, "sh")[0].code.splitlines() if "qtasks" in line]
    environment = {"XDG_DATA_HOME": str(tmp_path)}
    with Process("-m", *command.split(), environment=environment, cwd=tmp_path) as worker:
        worker.wait_for("queues images, 10 tasks at once, knows shop.thumbnail")
        assert worker.terminate() == 0


def test_blocking_sums(tmp_path: Path) -> None:
    (block,) = [b for b in BLOCKS if b.file == "sums.py"]
    program = tmp_path / block.file
    program.write_text(block.code)
    environment = {"XDG_DATA_HOME": str(tmp_path)}
    with (
        Process(str(program), "work", environment=environment) as worker,
        Process(str(program), environment=environment) as client,
    ):
        client.wait_for("3\n")
        assert worker.terminate() == 0


def test_serving(tmp_path: Path) -> None:
    (block,) = [b for b in BLOCKS if b.file == "serve.py"]
    program = tmp_path / block.file
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program.write_text(block.code.replace("8080", str(port)))
    with Process(str(program), environment={"XDG_DATA_HOME": str(tmp_path)}) as supervisor:
        url = f"http://127.0.0.1:{port}/ready"
        until(lambda: answers(url), "ready")
        assert supervisor.terminate() == 0


def test_what_a_task_requires(tmp_path: Path) -> None:
    (block,) = [b for b in BLOCKS if b.file == "bank.py"]
    program = tmp_path / block.file
    program.write_text(block.code)
    ran = subprocess.run(
        [sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    page = " ".join(block.page.read_text().split())
    first, _, rest = ran.stdout.partition(" (")
    _, _, last = rest.partition("; set ")
    assert first in page
    assert last.partition(", RabbitMQ")[0] in page
    assert last.startswith("?synchronous=full; each broker that can: KafkaBroker, PostgresBroker")


def test_functions_in_processes(tmp_path: Path) -> None:
    (block,) = [b for b in BLOCKS if b.file == "primes.py"]
    program = tmp_path / block.file
    program.write_text(block.code)
    environment = {"XDG_DATA_HOME": str(tmp_path)}
    with (
        Process(str(program), "work", environment=environment) as worker,
        Process(str(program), environment=environment) as client,
    ):
        client.wait_for("[2, 3, 5, 7, 11, 13, 17, 19]\n")
        assert worker.terminate() == 0


async def test_an_executor_of_ones_own() -> None:
    names: dict[str, Any] = {"__name__": "docs"}
    (block,) = [b for b in blocks_of(ROOT / "docs" / "worker.md") if not b.file]
    await run(block, names)
    async with names["app"].worker():
        task = await asyncio.to_thread(names["print_label"].add_task, "x", timeout=10)
    assert task.returning == "[x]"


def answers(url: str) -> bool:
    """Say whether there is a good answer."""
    try:
        with urlopen(url, timeout=5):
            return True
    except OSError:
        return False


RUN_AS_PAGES = (
    "first-task.md", "choosing.md", "delivery.md", "faces.md", "celery.md", "cli.md", "worker.md",
    "types.md", "balancing.md",
)  # fmt: skip


def test_every_block_is_run_by_a_test() -> None:
    """A new block needs a test here or of its page, or to be a file of the example."""
    run_here = {"sums.py", "divisions.py", "serve.py", "primes.py", "bank.py"}
    left = [
        name_of(block)
        for block in BLOCKS
        if not of_the_example(block)
        and block.page.name != "backends.md"  # tests/packaging/test_stranger.py
        and block.page.name != "retries.md"  # test_retries_page.py
        and block.page.name != "postgres.md"  # tests/postgres/test_pooler.py
        and block.page.name != "outbox.md"  # tests/postgres/test_outbox.py
        and block.page.name != "testing.md"  # test_testing_page.py
        # tests/compose/test_page.py
        and block.page.name not in ("compose.md", "migrating.md", "storages.md")
        and block.file not in run_here
        and (block.file or block.page.name not in RUN_AS_PAGES)
    ]
    assert not left


def test_no_block_is_of_a_kind_that_no_test_reads() -> None:
    """Neither by its language nor by where it stands."""
    known = {"python", "sh", "console", "mermaid"}
    # The SQL is run by tests/postgres/test_enqueue.py.
    of_a_page = {("celery.md", "py"), ("backends.md", "toml"), ("postgres.md", "sql")}
    for page in PAGES:
        fences = re.findall(r"^(.*)(?:```|~~~)(.*)$", page.read_text(), re.MULTILINE)
        for before, language in fences[::2]:
            assert (before, language in known or (page.name, language) in of_a_page) == ("", True)


def test_the_pages_lead_from_one_to_the_next() -> None:
    """In the README's order, each linked by the last line of the one before it."""
    order = re.findall(r"^\d+\. \[.*?\]\(docs/(.*?)\)", PAGES[0].read_text(), re.MULTILINE)
    assert len(order) == 14
    for page, following in pairwise(order):
        last = (ROOT / "docs" / page).read_text().splitlines()[-1]
        assert re.match(rf"Next: \[.*?\]\({following}\)", last), page


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").glob("*/README.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_its_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page.read_text())
    assert [link for link, _ in links if not (page.parent / link).exists()] == []
    for link, anchor in links:
        if anchor:
            target = page.parent / link if link else page
            assert anchor.removeprefix("#") in anchors_of(target), f"{link}{anchor}"


def anchors_of(page: Path) -> set[str]:
    """Return the names that a page's headings are linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
