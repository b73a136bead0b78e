"""`guarantees`: in the words of the one who reads them."""

from __future__ import annotations

import re

import pytest

from qtasks.cli.backends import NEEDED_BY
from qtasks_conformance.contracts.declaring import optional_methods
from qtasks_core import Broker, Storage
from tests.cli.command import Command
from tests.services import Service


def test_guarantees_name_commands_and_no_methods(postgres_server: Service) -> None:
    qtasks = Command({"QTASKS_BROKER_URL": postgres_server.url})
    told = qtasks.ok("guarantees", "--json").json
    lines = [line for line in qtasks.ok("guarantees").out.splitlines() if "not supported" in line]
    missing = [told[half]["unsupported"] for half in ("broker", "storage")]
    assert len(lines) == sum(map(bool, missing))
    for line, methods in zip(lines, filter(None, missing), strict=True):
        named = line.removeprefix("not supported").strip().split(", ")
        assert not set(named) & (set(methods) - {"purge", "migrate"})
        for method in methods:
            assert NEEDED_BY[method] in line


@pytest.mark.parametrize("contract", [Broker, Storage])
def test_every_method_that_may_be_missing_has_words(contract: type) -> None:
    assert set(optional_methods(contract)) <= NEEDED_BY.keys()


def test_what_no_call_can_ask_for_is_not_promised(postgres_server: Service) -> None:
    qtasks = Command({"QTASKS_BROKER_URL": postgres_server.url})
    assert not re.search("^transactions", qtasks.ok("guarantees").out, re.MULTILINE)
    assert "transactions" not in qtasks.ok("guarantees", "--json").json["broker"]
