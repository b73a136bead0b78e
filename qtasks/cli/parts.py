"""Commands for the parts an app is made of."""

from __future__ import annotations

import click
from msgspec.structs import asdict

from qtasks import control
from qtasks.cli.output import json_option, print_fields, print_json
from qtasks.cli.session import Session, pass_session


@click.command()
@json_option
@pass_session
def guarantees(session: Session, as_json: bool) -> None:
    """Say what the broker and the storage promise, configured and served as they are."""
    with session.started() as app:
        broker, storage = (asdict(part) for part in app.guarantees())
    if as_json:
        print_json({"broker": broker, "storage": storage})
        return
    for title, part in (("broker", broker), ("storage", storage)):
        print_fields({title: part.pop("part"), **part}, False)
        click.echo()


@click.command()
@json_option
@pass_session
def migrate(session: Session, as_json: bool) -> None:
    """Create or update what the servers must have. Harmless to repeat, and while others do it."""
    with session.started() as app:
        done = app.control_blocking(control.migrate)
    words = {part: "up to date" if was else "nothing to migrate" for part, was in done.items()}
    print_fields(words, as_json)
