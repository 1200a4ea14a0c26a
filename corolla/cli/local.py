"""Commands that work on this machine alone.

No logic: each reads options, calls one function, prints what comes back. What takes seconds to
import, as torch does, is imported when a command runs.
"""

import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from corolla.cli.options import (
    CANARIES,
    SEARCH,
    SIMULATION,
    AsJson,
    Config,
    Given,
    NewFolder,
    Resume,
    Set,
    run_options,
    takes,
)
from corolla.cli.screen import err, out, spinner
from corolla.errors import ConfigError
from corolla.host.heap import importing


@takes(options=run_options(), kept=SIMULATION)
def simulate(
    *,
    config: Config = None,
    options: Given,
    kept: Given,
    resume: Resume = False,
    out_dir: Annotated[Path | None, typer.Option("--out", help="A new or empty folder.")] = None,
    settings: Set = None,
) -> None:
    """Fine-tune a model with a federation of simulated clients on this machine."""
    with importing():
        from corolla.config.load import load, resumed
        from corolla.strategies.listing.registry import label

    if resume and out_dir is None:
        raise ConfigError("--resume needs --out: the folder of the run to go on with")
    if resume and out_dir:
        run_config = resumed(out_dir, config, options, settings or ())
    else:
        run_config = load(config, options, settings or ())
    now = time.strftime("%Y%m%d-%H%M%S")
    folder = out_dir or Path("runs") / f"{label(run_config.strategy)}-{now}"
    with out.status("loading"), importing():  # torch, transformers and peft take seconds to import
        from corolla.commands.simulate.in_process import simulate as run
        from corolla.commands.simulate.progress import Bars, print_summary
        from corolla.server.runs.observer import Many
        from corolla.trackers import tracking

    with (
        Bars(out, run_config.rounds) as bars,
        tracking(kept["track"] or (), folder, bars.warned) as trackers,
    ):
        summary = run(
            run_config,
            folder,
            Many([bars, *trackers]),
            keep_updates=kept["keep_updates"],
            resume=resume,
            on_step=bars.stepped,
        )
    print_summary(out, summary)
    if kept["fail_on_warning"] and summary.warnings:
        raise typer.Exit(1)


@takes(options=run_options())
def plan(
    *,
    config: Config = None,
    options: Given,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What a client may take: 2GB, 512MiB.")
    ] = None,
    fit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[CLASS:]LIMIT=VALUE,…",
            help="Say the most that devices of a class can train, as settings: memory=2GB, "
            "bytes=1MB (an update), seconds=60 (a round), flops=20e9 (a second; else measured).",
        ),
    ] = None,
    as_json: AsJson = False,
    settings: Set = None,
) -> None:
    """Say what a run will cost before anything is loaded: bytes, memory, time, privacy."""
    from corolla.config.load import load
    from corolla.host.text import parse_bytes

    try:
        budget = parse_bytes(memory) if memory is not None else None
    except ValueError as error:
        raise ConfigError(f"--memory: {error}; found {memory!r}") from error
    run_config = load(config, options, settings or ())
    if fit:
        from corolla.commands.plan import fit as fitting

        found = fitting.fit(run_config, fit)
        print(json.dumps(found.to_json(), indent=2) if as_json else found.lines())
        return
    with importing():
        from corolla.commands.plan import plan as planning
        from corolla.commands.plan.screen import print_plan

    estimate = planning.plan(run_config, budget)
    if as_json:
        print(json.dumps(estimate.to_json(), indent=2))
    else:
        print_plan(out, estimate, budget)


@takes(options=run_options("data"))
def data(
    *,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]", help="A file, a folder or a hub name; default: that of --config."
        ),
    ] = None,
    config: Config = None,
    options: Given,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Lengths of so many rows; default: of all.")
    ] = None,
    as_json: AsJson = False,
    settings: Set = None,
) -> None:
    """Look at data before training: how it is read, whose it is, what is cut or dropped."""
    from corolla.config.load import load

    run_config = load(config, {**options, "data": file}, settings or ())
    with err.status(f"reading {escape(run_config.data)}"):
        with importing():
            from corolla.commands.data import screen
            from corolla.commands.data.look import look, read

        rows = read(run_config)
    found = look(run_config, rows, sample, partial(screen.counted, err))
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        screen.print_look(out, found, run_config)


@takes(
    options=run_options(
        "strategy",
        usual={"cohort": "4 with the embedded model and data, else 8, or all clients"},
        lr="The middle of the three learning rates that are tried.",
        seed="The first seed, with which learning rates are tried.",
    ),
    search=SEARCH,
)
def compare(
    *,
    strategies: Annotated[
        list[str], typer.Argument(help="Two or more: NAME or NAME@key=value,…; FILE.py:Class.")
    ],
    out_dir: NewFolder,
    config: Config = None,
    options: Given,
    search: Given,
    resume: Resume = False,
    settings: Set = None,
) -> None:
    """Compare strategies on equal terms: same data, clients and search; seeds, verdicts, plots.

    With the embedded model and data: cohorts of 4 and shorter evaluation, unless given.
    """
    with out.status("loading"), importing():
        from corolla.commands.compare import compare as comparing
        from corolla.commands.compare.contenders import Contender, baselines
        from corolla.commands.compare.grid import learning_rates, make_grid
        from corolla.commands.compare.screen import CellBars, print_comparison

    jobs, strict = int(search["jobs"]), search.pop("fail_on_warning")
    search["lrs"] = learning_rates(search["lrs"])
    named: list[str | Contender] = [*strategies, *baselines(search.pop("baselines"))]
    grid = make_grid(named, config, options, settings or (), **search)
    bars = CellBars(out)
    with bars.progress:
        results = comparing.compare(grid, out_dir, jobs=jobs, resume=resume, watch=bars)
    print_comparison(out, results, out_dir)
    warned = any(entry.get("warnings") for entry in results["methods"])
    if results["failed"] or (strict and warned):
        raise typer.Exit(1)


def check(
    strategies: Annotated[
        list[str] | None,
        typer.Argument(help="Names, FILE.py:Class, module:Class, or all, the default."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option: strategy.KEY or NAME.KEY."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prove strategies on effective model weights; exit code 1 when one fails."""
    with importing():
        from corolla.commands.check import options
        from corolla.commands.check.proofs import conform
        from corolla.commands.check.screen import print_findings
        from corolla.strategies.listing.registry import STRATEGIES

    names = [*STRATEGIES] if strategies in (None, [], ["all"]) else list(strategies or ())
    results = conform(names, spinner(as_json), given=options.given(names, settings or ()))
    if as_json:
        print(json.dumps([result.to_json() for result in results], indent=2))
    else:
        print_findings(out, results)
    if not all(result.passed for result in results):
        raise typer.Exit(1)


@takes(
    options=run_options(
        "engine",
        clients="The number of clients; canaries are clients beside them, or rows of the first.",
        cohort="The number of clients in a round, for --membership and dp-sampling=poisson; else "
        "canaries are all asked that may be.",
        seed="The seed of the run, and of the coins.",
    ),
    tried=CANARIES,
)
def audit(
    *,
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN", help="A run's folder: what it did is audited; default: the options."
        ),
    ] = None,
    config: Config = None,
    options: Given,
    tried: Given,
    membership: Annotated[
        bool, typer.Option("--membership", help="Instead: attack a model, with and without dp.")
    ] = False,
    as_json: AsJson = False,
    settings: Set = None,
) -> None:
    """Try to refute the claim of privacy of a RUN, or of options; exit code 1 when refuted."""
    given = ["config"] * bool(config) + ["set"] * bool(settings)
    given += [name for name, value in options.items() if value is not None]
    if run and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"audit {run} takes model, data, strategy and privacy of that run: leave out {flags}"
        )
    with importing():
        from corolla.commands.audit import done
        from corolla.commands.audit import run as auditing
        from corolla.commands.audit.screen import print_audit, print_membership
        from corolla.config.load import load

    of = done.read(run) if run else None
    run_config = of.config if of else load(config, options, settings or ())
    if membership:
        attacked = auditing.membership(run_config, of)
        if as_json:
            print(json.dumps(attacked.to_json(), indent=2))
        else:
            print_membership(out, attacked)
        return
    found = auditing.audit(run_config, tried["canaries"], tried["guesses"], tried["unit"], of)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_audit(out, found)
    if found.refuted:
        raise typer.Exit(1)


def strategies(
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="docs/strategies.md.")] = False,
) -> None:
    """List all strategies: what they average, their bytes, when to use which."""
    if as_json and as_markdown:
        raise ConfigError("--json and --markdown are two forms of one list: choose one")
    from corolla.commands import catalogue

    if as_json:
        print(json.dumps([entry.to_json() for entry in catalogue.entries()], indent=2))
    elif as_markdown:
        print(catalogue.markdown(), end="")
    else:
        catalogue.print_catalogue(out)


def keys(
    word: Annotated[
        str | None, typer.Argument(help="A key, or a word of its name or text; default: all keys.")
    ] = None,
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="docs/settings.md.")] = False,
) -> None:
    """Explain the keys of a run: type, default, meaning, example, and what each excludes."""
    if as_json and as_markdown:
        raise ConfigError("--json and --markdown are two forms of one list: choose one")
    if word is not None and as_markdown:
        raise ConfigError("--markdown is a page of all keys: leave the word out")
    from corolla.commands import keys as reference
    from corolla.config.keys import table

    if as_markdown:
        print(reference.markdown(), end="")
        return
    found = table() if word is None else reference.find(word)
    if as_json:
        print(json.dumps([key.to_json() for key in found], indent=2))
    elif word is not None and len(found) == 1:
        reference.print_key(out, found[0])
    else:
        reference.print_keys(out, found)
