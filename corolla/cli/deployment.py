"""Commands of a deployment: its server, its devices, and what they need before and show after."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from corolla.cli.options import (
    CONDITIONS,
    DEVICE,
    GATEWAY,
    PHONE,
    SERVER,
    AsJson,
    Config,
    Given,
    NewFolder,
    Resume,
    Set,
    run_options,
    takes,
)
from corolla.cli.screen import out, say


def status(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a run.")],
    as_json: AsJson = False,
) -> None:
    """Show how a run stands: state, rounds, clients, verdicts on replies, bytes, losses."""
    from corolla.server.runs import status as standing

    found = standing.status(folder)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        standing.print_status(out, found)


def tokens(
    data: Annotated[str, typer.Argument(help="FILE.jsonl of a device's own rows.")],
    model: Annotated[str, typer.Option(help="Hub name, folder, 'embedded', or a bundle.")],
    out_file: Annotated[Path, typer.Option("--out", help="FILE.jsonl of token ids.")],
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence, at most.")] = 256,
    template_date: Annotated[
        str, typer.Option(help="The run's key of this name, where its model's template needs it.")
    ] = "",
) -> None:
    """Turn text into the token ids that a native client trains on."""
    from corolla.phones.token_file import write

    sequences, examples = write(model, data, out_file, max_length, template_date)
    say(f"{out_file}: {sequences} sequences of {examples} examples")


def certs(
    folder: Annotated[Path, typer.Argument(help="A folder for ca.pem, server.pem and keys.")],
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address clients use; repeatable.")
    ] = None,
    gateway: Annotated[
        list[str] | None, typer.Option(help="Of a gateway: makes gateway.pem too; repeatable.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long they are valid.")] = 825,
) -> None:
    """Make a certificate authority and certificates for a federation of your own."""
    from corolla.host.certificates import make

    make(folder, host or (), gateway or (), days)
    say(f"{folder}: give ca.pem to clients, keep ca.key apart from the server")


def members(
    folder: Annotated[Path, typer.Argument(help="The folder of clients' keys, NAME.pub.")],
    remove: Annotated[str | None, typer.Option(metavar="NAME", help="Keep it out.")] = None,
    restore: Annotated[str | None, typer.Option(metavar="NAME", help="Let it in again.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bind the names of clients to their registered keys, show them, and remove one at once."""
    from corolla.server.deployment import members as roll

    roll.admit_all(folder)
    if remove:
        roll.remove(folder, remove)
    if restore:
        roll.restore(folder, restore)
    found = roll.read(folder)
    if as_json:
        print(json.dumps([asdict(member) for member in found], indent=2))
        return
    for member in found:
        gone = f", removed {member.removed}" if member.removed else ""
        say(f"{member.name}: key {member.key[:16]}, since {member.since}{gone}")


@takes(
    options=run_options(
        *("clients", "engine", "dp", "epsilon", "delta", "clip"),
        data="The data set that the server measures on: 'embedded', a .jsonl file or a hub name.",
    ),
    machine=SERVER,
)
def server(
    *,
    out_dir: NewFolder,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the same names, and a server table.")
    ] = None,
    options: Given,
    keep_updates: Annotated[
        bool, typer.Option("--keep-updates", help="Keep the global adapter of every round.")
    ] = False,
    resume: Resume = False,
    machine: Given,
    settings: Set = None,
) -> None:
    """Coordinate a federation of devices: they join with corolla client."""
    from corolla.config.load import load, unchanged, validate
    from corolla.server.deployment.order import read_order, read_settings

    machine["certs"], strict = machine.pop("certificates"), machine.pop("fail_on_warning")
    stored = validate(read_order(out_dir).config) if resume else None
    chosen = read_settings(config, machine, resumed=out_dir if resume else None)
    if stored:
        run_config = unchanged(stored, options, settings or (), config)
    else:
        run_config = load(config, options, settings or ())
    from corolla.server.deployment.supervisor import begin

    warned = begin(run_config, out_dir, chosen, keep_updates=keep_updates, resume=resume, say=say)
    if strict and warned:
        raise typer.Exit(1)


@takes(device=DEVICE)
def client(
    *,
    device: Given,
    config: Config = None,
    make_key: Annotated[
        bool, typer.Option("--make-key", help="Only make the key and say where it is.")
    ] = False,
) -> None:
    """Train on this device's own data in a federation, until told to stop."""
    from corolla.client.device import identity, settings

    if make_key:
        key = identity.make_key(config, device)
        out.print(f"{escape(str(key.public))} {key.fingerprint}", soft_wrap=True)
        return
    from corolla.client.device.node import begin

    begin(settings.load(config, device), say)


@takes(asked=GATEWAY)
def gateway(*, asked: Given) -> None:
    """Be one member of a federation for many phones: choose them, merge their updates."""
    from corolla.commands.gateway import GatewayOptions, begin, order

    server, root_certificates = asked.pop("server"), asked.pop("root_certificates")
    asked["allow"] = asked["allow"] or ()
    begin(server, root_certificates, order(GatewayOptions(**asked)), say)


@takes(device=PHONE, conditions=CONDITIONS)
def phone(
    *,
    device: Given,
    conditions: Given,
    daily_data: Annotated[
        str | None, typer.Option(help="Up and down in 24 hours, as 50MB; default: any.")
    ] = None,
    daily_seconds: Annotated[float, typer.Option(min=0, help="At work in 24 hours; 0: any.")] = 0.0,
    rounds: Annotated[int, typer.Option(min=0, help="End after so many; 0: never.")] = 0,
    once: Annotated[bool, typer.Option("--once", help="End after one check-in.")] = False,
) -> None:
    """Train on this device's own data for a gateway, whenever it asks, until told to stop."""
    from corolla.client.device import settings
    from corolla.client.phone import trainer
    from corolla.phones import protocol

    name, token_file = device.pop("name"), device.pop("token_file")
    device["server"] = protocol.check_address("--gateway", device.pop("gateway"))
    device["state"] = device["state"] or settings.state_folder() / "phone"
    mine = settings.load(None, device)
    limits = trainer.limits(daily_data, daily_seconds)
    has_model = device["model"] is not None
    chosen = trainer.settings(mine, name, token_file, has_model, conditions, limits)
    trainer.begin(mine, chosen, say, rounds, once)
