"""The command line. No logic: it reads options, calls one function, prints what comes back."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from corolla.errors import ConfigError, CorollaError
from corolla.version import __version__

# Before anything imports them: no telemetry, no update check, no advice of tokenizers on forks.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what fails is said by us, in one line

app = typer.Typer(
    name="corolla",
    help="Federated fine-tuning of language models on Flower.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key.")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """One line and an exit code for what a user can cause."""
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    except CorollaError as error:
        err.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:  # a full disk, a folder without permission
        err.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        err.print("[yellow]stopped[/]")
        raise typer.Exit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"corolla {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Federated fine-tuning of language models on Flower."""
    sys.path.insert(0, str(Path.cwd()))  # strategies of one's own: module:Class in this folder


@app.command()
def simulate(
    config: Annotated[Path | None, typer.Option(help="TOML file with the same names.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="fedavg, flora, …; yours: FILE.py:Class, module:Class.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub name, folder, .gguf, 'embedded'.")] = None,
    data: Annotated[str | None, typer.Option(help="FILE.jsonl, hub name, 'embedded'.")] = None,
    clients: Annotated[int | None, typer.Option(help="How many clients.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Clients per round.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Optimiser steps per round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything that is random.")] = None,
    engine: Annotated[str | None, typer.Option(help="inprocess or flower (Ray).")] = None,
    dp: Annotated[
        str | None, typer.Option(help="Differential privacy of each: none, example, client.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget of the run.")] = None,
    delta: Annotated[float | None, typer.Option(help="Of (epsilon, delta).")] = None,
    clip: Annotated[
        float | None, typer.Option(help="Norm of a gradient, or a client's update, at most.")
    ] = None,
    keep_updates: Annotated[
        bool, typer.Option("--keep-updates", help="Keep every client's adapter as a PEFT folder.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out.")] = False,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, mlflow, trackio; repeatable.")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="A new or empty folder.")] = None,
    settings: Set = None,
) -> None:
    """Fine-tune a model with a federation of simulated clients on this machine."""
    options: dict[str, Any] = {
        "strategy": strategy,
        "model": model,
        "data": data,
        "clients": clients,
        "cohort": cohort,
        "rounds": rounds,
        "local_steps": local_steps,
        "batch_size": batch_size,
        "lr": lr,
        "rank": rank,
        "alpha": alpha,
        "seed": seed,
        "engine": engine,
        "dp": dp,
        "epsilon": epsilon,
        "delta": delta,
        "clip": clip,
    }
    with _user_errors():
        from corolla.config.load import load, resumed

        if resume and out_dir is None:
            raise ConfigError("--resume needs --out: the folder of the run to go on with")
        if resume and out_dir:
            run_config = resumed(out_dir, config, options, settings or ())
        else:
            run_config = load(config, options, settings or ())
        folder = out_dir or Path("runs") / f"{run_config.strategy.split(':')[-1]}-{_now()}"
        with out.status("loading"):  # torch, transformers and peft take seconds to import
            from corolla.commands.simulate.in_process import simulate as run
            from corolla.commands.simulate.progress import Bars, print_summary
            from corolla.server.runs.observer import Many
            from corolla.trackers import tracking

        with (
            Bars(out, run_config.rounds) as bars,
            tracking(track or (), folder, bars.warned) as trackers,
        ):
            summary = run(
                run_config,
                folder,
                Many([bars, *trackers]),
                keep_updates=keep_updates,
                resume=resume,
                on_step=bars.stepped,
            )
        print_summary(out, summary)


@app.command()
def plan(
    config: Annotated[Path | None, typer.Option(help="TOML file with the same names.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="fedavg, flora, …; yours: FILE.py:Class, module:Class.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub name, folder, .gguf, 'embedded'.")] = None,
    data: Annotated[str | None, typer.Option(help="FILE.jsonl, hub name, 'embedded'.")] = None,
    clients: Annotated[int | None, typer.Option(help="How many clients.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Clients per round.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Optimiser steps per round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything that is random.")] = None,
    engine: Annotated[str | None, typer.Option(help="inprocess or flower (Ray).")] = None,
    dp: Annotated[
        str | None, typer.Option(help="Differential privacy of each: none, example, client.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget of the run.")] = None,
    delta: Annotated[float | None, typer.Option(help="Of (epsilon, delta).")] = None,
    clip: Annotated[
        float | None, typer.Option(help="Norm of a gradient, or a client's update, at most.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What a client may take: 2GB, 512MiB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    settings: Set = None,
) -> None:
    """Say what a run will cost before anything is loaded: bytes, memory, time, privacy."""
    options: dict[str, Any] = {
        "strategy": strategy,
        "model": model,
        "data": data,
        "clients": clients,
        "cohort": cohort,
        "rounds": rounds,
        "local_steps": local_steps,
        "batch_size": batch_size,
        "lr": lr,
        "rank": rank,
        "alpha": alpha,
        "seed": seed,
        "engine": engine,
        "dp": dp,
        "epsilon": epsilon,
        "delta": delta,
        "clip": clip,
    }
    with _user_errors():
        from corolla.config.load import load
        from corolla.host.text import parse_bytes

        try:
            budget = parse_bytes(memory) if memory is not None else None
        except ValueError as error:
            raise ConfigError(f"--memory: {error}; found {memory!r}") from error
        run_config = load(config, options, settings or ())
        from corolla.commands.plan import plan as planning
        from corolla.commands.plan.screen import print_plan

        estimate = planning.plan(run_config, budget)
        if as_json:
            print(json.dumps(estimate.to_json(), indent=2))
        else:
            print_plan(out, estimate, budget)


@app.command()
def compare(
    strategies: Annotated[
        list[str], typer.Argument(help="Two or more: names, FILE.py:Class, module:Class.")
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="A new or empty folder.")],
    config: Annotated[Path | None, typer.Option(help="TOML file with the same names.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub name, folder, .gguf, 'embedded'.")] = None,
    data: Annotated[str | None, typer.Option(help="FILE.jsonl, hub name, 'embedded'.")] = None,
    clients: Annotated[int | None, typer.Option(help="How many clients.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Clients per round.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Optimiser steps per round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Middle of the three that are tried.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha.")] = None,
    seed: Annotated[int | None, typer.Option(help="The first seed; the search's.")] = None,
    engine: Annotated[str | None, typer.Option(help="inprocess or flower (Ray).")] = None,
    dp: Annotated[
        str | None, typer.Option(help="Differential privacy of each: none, example, client.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget of the run.")] = None,
    delta: Annotated[float | None, typer.Option(help="Of (epsilon, delta).")] = None,
    clip: Annotated[
        float | None, typer.Option(help="Norm of a gradient, or a client's update, at most.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each strategy; 1 allows no claim.")] = 3,
    lrs: Annotated[
        str, typer.Option(metavar="A,B,C", help="Tried by all; default: the usual one × 1/3, 1, 3.")
    ] = "",
    jobs: Annotated[int, typer.Option(help="Runs at a time; 0: as cores and memory allow.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out.")] = False,
    settings: Set = None,
) -> None:
    """Compare strategies on equal terms: same data, clients and search; seeds, intervals, plots.

    With the embedded model and data: cohorts of 4 and shorter evaluation, unless given.
    """
    options: dict[str, Any] = {
        "model": model,
        "data": data,
        "clients": clients,
        "cohort": cohort,
        "rounds": rounds,
        "local_steps": local_steps,
        "batch_size": batch_size,
        "lr": lr,
        "rank": rank,
        "alpha": alpha,
        "seed": seed,
        "engine": engine,
        "dp": dp,
        "epsilon": epsilon,
        "delta": delta,
        "clip": clip,
    }
    with _user_errors():
        with out.status("loading"):
            from corolla.commands.compare import compare as comparing
            from corolla.commands.compare.grid import learning_rates, make_grid
            from corolla.commands.compare.screen import CellBars, print_comparison

        tried = learning_rates(lrs)
        grid = make_grid(
            strategies, config, options, settings or (), seeds=seeds, lrs=tried, jobs=jobs
        )
        bars = CellBars(out)
        with bars.progress:
            results = comparing.compare(grid, out_dir, jobs=jobs, resume=resume, watch=bars)
        print_comparison(out, results, out_dir)
        if results["failed"]:
            raise typer.Exit(1)


@app.command()
def check(
    strategies: Annotated[
        list[str] | None, typer.Argument(help="Names, FILE.py:Class, module:Class; default: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Prove strategies on effective model weights; exit code 1 when one fails."""
    with _user_errors():
        from corolla.commands.check.proofs import conform
        from corolla.commands.check.screen import print_findings
        from corolla.strategies.registry import STRATEGIES

        results = conform(list(strategies or STRATEGIES), _spinner(as_json))
        if as_json:
            print(json.dumps([result.to_json() for result in results], indent=2))
        else:
            print_findings(out, results)
        if not all(result.passed for result in results):
            raise typer.Exit(1)


@app.command()
def audit(
    config: Annotated[Path | None, typer.Option(help="TOML file with the same names.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="fedavg, flora, …; yours: FILE.py:Class, module:Class.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub name, folder, .gguf, 'embedded'.")] = None,
    data: Annotated[str | None, typer.Option(help="FILE.jsonl, hub name, 'embedded'.")] = None,
    clients: Annotated[int | None, typer.Option(help="How many clients.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Clients per round.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Optimiser steps per round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the run, and of the coins.")] = None,
    dp: Annotated[str | None, typer.Option(help="none, example or client.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Budget of the run.")] = None,
    delta: Annotated[float | None, typer.Option(help="Less than 1 in what is protected.")] = None,
    clip: Annotated[float | None, typer.Option(help="L2 norm of what one can add.")] = None,
    canaries: Annotated[int, typer.Option(min=1, help="There or not, by a coin each.")] = 1000,
    guesses: Annotated[
        int | None, typer.Option(min=1, help="Of coins; default: a fifth of the canaries.")
    ] = None,
    unit: Annotated[
        Literal["example", "client"] | None, typer.Option(help="What canaries are with dp=none.")
    ] = None,
    membership: Annotated[
        bool, typer.Option("--membership", help="Instead: attack a model, with and without dp.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    settings: Set = None,
) -> None:
    """Try to refute a claim of differential privacy; exit code 1 when it is refuted."""
    options: dict[str, Any] = {
        "strategy": strategy,
        "model": model,
        "data": data,
        "clients": clients,
        "cohort": cohort,
        "rounds": rounds,
        "local_steps": local_steps,
        "batch_size": batch_size,
        "lr": lr,
        "rank": rank,
        "alpha": alpha,
        "seed": seed,
        "dp": dp,
        "epsilon": epsilon,
        "delta": delta,
        "clip": clip,
    }
    with _user_errors():
        from corolla.config.load import load

        run_config = load(config, options, settings or ())
        from corolla.commands.audit import run as auditing
        from corolla.commands.audit.screen import print_audit, print_membership

        if membership:
            attacked = auditing.membership(run_config)
            if as_json:
                print(json.dumps(attacked.to_json(), indent=2))
            else:
                print_membership(out, attacked)
            return
        found = auditing.audit(run_config, canaries, guesses, unit)
        if as_json:
            print(json.dumps(found.to_json(), indent=2))
        else:
            print_audit(out, found)
        if found.refuted:
            raise typer.Exit(1)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show how a run stands: state, rounds, clients, verdicts on replies, bytes, losses."""
    with _user_errors():
        from corolla.server.runs import status as standing

        found = standing.status(folder)
        if as_json:
            print(json.dumps(found.to_json(), indent=2))
        else:
            standing.print_status(out, found)


@app.command("strategies")
def list_strategies(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="docs/strategies.md.")] = False,
) -> None:
    """List all strategies: what they average, their bytes, when to use which."""
    with _user_errors():
        if as_json and as_markdown:
            raise ConfigError("--json and --markdown are two forms of one list: choose one")
        from corolla.commands import catalogue

        if as_json:
            print(json.dumps([entry.to_json() for entry in catalogue.entries()], indent=2))
        elif as_markdown:
            print(catalogue.markdown(), end="")
        else:
            catalogue.print_catalogue(out)


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="A run's adapter/ or model/ folder.")],
    model: Annotated[str | None, typer.Option(help="Default: the one it was trained on.")] = None,
    data: Annotated[str | None, typer.Option(help="Default: the data of its run.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead: lm-evaluation-harness tasks, NAME,FILE.yaml,…"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task; for trials.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    settings: Set = None,
) -> None:
    """Score an adapter beside its base model on held-out examples, with plain PEFT."""
    with _user_errors():
        from corolla.commands.artefacts import evaluate_adapter, evaluate_tasks, print_scores

        if tasks is not None:
            if data:
                raise ConfigError("--tasks bring their own data: leave out --data")
            names = [name for name in tasks.split(",") if name]
            scores = evaluate_tasks(adapter, model, names, limit, settings or ())
        else:
            scores = evaluate_adapter(adapter, model, data, settings or ())
        if as_json:
            print(json.dumps(scores, indent=2))
        else:
            print_scores(out, scores)


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER|MODEL", help="A PEFT adapter folder; for executorch also a base model."
        ),
    ],
    to: Annotated[
        Literal["merged", "executorch"],
        typer.Option(help="merged: a plain model folder; executorch: programs for native clients."),
    ] = "merged",
    model: Annotated[str | None, typer.Option(help="Default: the one it was trained on.")] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="A new folder; default: ADAPTER-merged.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="To sign with; made, with its .pub, where there is none.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="LoRA rank; default: the adapter's, or 8.")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(metavar="A,B", help="Default: the adapter's, or all linear ones.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence, at most; default: 256.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="fp32, q4 or fp32,q4; default: fp32,q4.")] = None,
) -> None:
    """Write an adapter and its base as one model, or a base as a signed bundle for phones."""
    options: dict[str, Any] = {
        "rank": rank,
        "targets": target_modules.split(",") if target_modules else None,
        "length": length,
        "bases": base,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with _user_errors():
        if to == "merged" and (given or key):
            raise ConfigError(
                "--key, --rank, --target-modules, --length and --base are for --to executorch: "
                "leave them out"
            )
        if to == "executorch":
            with out.status("loading") as shown:
                from corolla.phones import export as bundling

                made = bundling.make(
                    source,
                    out_dir,
                    key,
                    model=model,
                    say=shown.update,
                    **given,
                )
            _say(bundling.summary(made, str(out_dir)))
            return
        from corolla.commands.artefacts import export_merged

        adapter = Path(source)
        folder = out_dir or adapter.resolve().with_name(adapter.resolve().name + "-merged")
        difference = export_merged(adapter, model, folder)
        out.print(
            f"{escape(str(folder))}: reloaded, logits within {difference:.1e} of base + adapter",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def tokens(
    data: Annotated[str, typer.Argument(help="FILE.jsonl of a device's own rows.")],
    model: Annotated[str, typer.Option(help="Hub name, folder, 'embedded', or a bundle.")],
    out_file: Annotated[Path, typer.Option("--out", help="FILE.jsonl of token ids.")],
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence, at most.")] = 256,
) -> None:
    """Turn text into the token ids that a native client trains on."""
    with _user_errors():
        from corolla.phones.token_file import write

        sequences, examples = write(model, data, out_file, max_length)
        _say(f"{out_file}: {sequences} sequences of {examples} examples")


@app.command()
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
    with _user_errors():
        from corolla.host.certificates import make

        make(folder, host or (), gateway or (), days)
        out.print(
            f"{escape(str(folder))}: give ca.pem to clients, keep ca.key apart from the server",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def server(
    out_dir: Annotated[Path, typer.Option("--out", help="A new or empty folder.")],
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the same names, and a server table.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="fedavg, flora, …; yours: FILE.py:Class, module:Class.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub name, folder, .gguf, 'embedded'.")] = None,
    data: Annotated[
        str | None, typer.Option(help="What it measures on: FILE.jsonl, hub name, 'embedded'.")
    ] = None,
    cohort: Annotated[int | None, typer.Option(help="Clients per round.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Optimiser steps per round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything that is random.")] = None,
    keep_updates: Annotated[
        bool, typer.Option("--keep-updates", help="Keep the global adapter of every round.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out.")] = False,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT for clients; default 0.0.0.0:9092.")
    ] = None,
    certificates: Annotated[
        Path | None, typer.Option("--certs", help="Folder of server.pem: see corolla certs.")
    ] = None,
    clients_keys: Annotated[
        Path | None, typer.Option(help="Folder of clients' public keys, *.pub; watched.")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Prometheus, on loopback.")] = None,
    min_clients: Annotated[int | None, typer.Option(help="To wait for before round 1.")] = None,
    settings: Set = None,
) -> None:
    """Coordinate a federation of devices: they join with corolla client."""
    options: dict[str, Any] = {
        "strategy": strategy,
        "model": model,
        "data": data,
        "cohort": cohort,
        "rounds": rounds,
        "local_steps": local_steps,
        "batch_size": batch_size,
        "lr": lr,
        "rank": rank,
        "alpha": alpha,
        "seed": seed,
    }
    own = {
        "address": address,
        "certs": certificates,
        "clients_keys": clients_keys,
        "metrics_port": metrics_port,
        "min_clients": min_clients,
    }
    with _user_errors():
        from corolla.config.load import load, unchanged, validate
        from corolla.server.deployment.order import read_order, read_settings

        chosen = read_settings(config, own)
        if resume:
            stored = validate(read_order(out_dir).config)
            run_config = unchanged(stored, options, settings or (), config)
        else:
            run_config = load(config, options, settings or ())
        from corolla.server.deployment.supervisor import begin

        begin(
            run_config,
            out_dir,
            chosen,
            keep_updates=keep_updates,
            resume=resume,
            say=lambda line: out.print(escape(line), highlight=False, soft_wrap=True),
        )


@app.command()
def client(
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="corolla server.")] = None,
    root_certificates: Annotated[
        Path | None, typer.Option(help="ca.pem of the server; default: the system's.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="FILE.jsonl: all rows are trained on.")] = None,
    name: Annotated[
        str | None, typer.Option(help="In the federation; default: made from the key.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The run's: hub name, folder, .gguf.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Key, logs, what is kept; default: ~/.local/state/corolla.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="For training, at most: 2GB.")] = None,
    threads: Annotated[int, typer.Option(help="Of the CPU; 0: all.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the best.")] = None,
    quantization: Annotated[str | None, typer.Option(help="none, 8bit or 4bit.")] = None,
    micro_batch_size: Annotated[int, typer.Option(help="At most; 0: as the run says.")] = 0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    epsilon: Annotated[
        float | None, typer.Option(help="Its examples may cost, in all runs; default: any.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Of that; default: 1e-5.")] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="FILE.py:Class a server may name as strategy; repeatable."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with the same names.")] = None,
    make_key: Annotated[
        bool, typer.Option("--make-key", help="Only make the key and say where it is.")
    ] = False,
) -> None:
    """Train on this device's own data in a federation, until told to stop."""
    options: dict[str, object] = {
        "server": server,
        "root_certificates": root_certificates,
        "data": data,
        "name": name,
        "model": model,
        "state": state,
        "memory": memory,
        "threads": threads,
        "device": device,
        "quantization": quantization,
        "micro_batch_size": micro_batch_size,
        "gradient_checkpointing": gradient_checkpointing,
        "epsilon": epsilon,
        "delta": delta,
        "allow": allow,
    }
    with _user_errors():
        from corolla.client.device import settings as own

        if make_key:
            key = own.make_key(config, options)
            out.print(f"{escape(str(key.public))} {key.fingerprint}", soft_wrap=True)
            return
        from corolla.client.device.node import begin

        begin(own.load(config, options), _say)


@app.command()
def gateway(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="corolla server.")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="For phones: 0.0.0.0:9443.")],
    certificate: Annotated[Path, typer.Option(help="Shown to phones: see corolla certs.")],
    key: Annotated[Path, typer.Option(help="Of the certificate.")],
    tokens: Annotated[Path, typer.Option(help="One a line: TOKEN, or TOKEN DEVICE.")],
    name: Annotated[str, typer.Option(help="In the federation; phones are NAME/DEVICE.")],
    state: Annotated[Path, typer.Option(help="Folder of the key, the logs and what is kept.")],
    root_certificates: Annotated[
        Path | None, typer.Option(help="ca.pem of the server; default: the system's.")
    ] = None,
    share_model: Annotated[
        Path | None, typer.Option(help="A base model's folder, for phones that have none.")
    ] = None,
    share_bundle: Annotated[
        Path | None, typer.Option(help="Programs for native phones: corolla export makes them.")
    ] = None,
    publisher: Annotated[
        Path | None, typer.Option(help="Public key that the bundle must be signed with.")
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="Asked of phones: these, battery=20, thermal=3, storage=100MB, examples=8, "
            "separation=2, period=24h, daily-bytes=50MB, daily-seconds=1800, daily-battery=5; none."
        ),
    ] = "charging,unmetered,idle",
    over_select: Annotated[
        float, typer.Option(min=1.0, max=10.0, help="Phones at work for each update wanted.")
    ] = 1.3,
    seats: Annotated[
        int, typer.Option(min=0, help="Updates it promises at a time; 0: as many as phones come.")
    ] = 0,
    retry: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between a phone's check-ins.")
    ] = 10.0,
    lease: Annotated[
        float, typer.Option(min=1, max=3600, help="Seconds a phone may be silent at work.")
    ] = 60.0,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="FILE.py:Class a server may name as strategy; repeatable."),
    ] = None,
) -> None:
    """Be one member of a federation for many phones: choose them, merge their updates."""
    with _user_errors():
        from corolla.commands.gateway import GatewayOptions, begin, order

        options = GatewayOptions(
            name=name,
            state=state,
            listen=listen,
            certificate=certificate,
            key=key,
            tokens=tokens,
            share_model=share_model,
            share_bundle=share_bundle,
            publisher=publisher,
            policy=policy,
            over_select=over_select,
            seats=seats,
            retry=retry,
            lease=lease,
            allow=allow or (),
        )
        begin(server, root_certificates, order(options), _say)


@app.command()
def phone(
    gateway: Annotated[str, typer.Option(metavar="HOST:PORT", help="corolla gateway.")],
    token_file: Annotated[Path, typer.Option(help="What the gateway's owner gave.")],
    data: Annotated[str, typer.Option(help="FILE.jsonl: all rows are trained on.")],
    root_certificates: Annotated[
        Path | None, typer.Option(help="ca.pem of the gateway; default: the system's.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Default: made once, kept in --state.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub name, folder, 'embedded'; default: the gateway's.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Models, logs, what is kept; default: as corolla client.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of the CPU; 0: all.")] = 0,
    epsilon: Annotated[
        float | None, typer.Option(help="Its examples may cost, in all runs; default: any.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Of that; default: 1e-5.")] = None,
    charging: Annotated[
        bool | None, typer.Option("--charging/--on-battery", help="Default: as found.")
    ] = None,
    metered: Annotated[
        bool | None, typer.Option("--metered/--unmetered", help="Default: as found.")
    ] = None,
    idle: Annotated[bool | None, typer.Option("--idle/--in-use", help="Default: idle.")] = None,
    daily_data: Annotated[
        str | None, typer.Option(help="Up and down in 24 hours, as 50MB; default: any.")
    ] = None,
    daily_seconds: Annotated[float, typer.Option(min=0, help="At work in 24 hours; 0: any.")] = 0.0,
    rounds: Annotated[int, typer.Option(min=0, help="End after so many; 0: never.")] = 0,
    once: Annotated[bool, typer.Option("--once", help="End after one check-in.")] = False,
) -> None:
    """Train on this device's own data for a gateway, whenever it asks, until told to stop."""
    with _user_errors():
        from corolla.client.device import settings as own
        from corolla.client.phone import trainer
        from corolla.phones import protocol

        options: dict[str, object] = {
            "server": protocol.check_address("--gateway", gateway),
            "root_certificates": root_certificates,
            "data": data,
            "model": model,
            "state": state or own.state_folder() / "phone",
            "threads": threads,
            "epsilon": epsilon,
            "delta": delta,
        }
        mine = own.load(None, options)
        told = {"charging": charging, "metered": metered, "idle": idle}
        limits = trainer.limits(daily_data, daily_seconds)
        chosen = trainer.settings(mine, name, token_file, model is not None, told, limits)
        trainer.begin(mine, chosen, _say, rounds, once)


def _say(line: str) -> None:
    out.print(escape(line), highlight=False, soft_wrap=True)


def _spinner(silent: bool) -> Callable[[str], None]:
    """Says what is being checked; nothing when the output is for a machine."""
    return (lambda text: None) if silent else (lambda text: out.print(text, style="dim"))


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
