"""Commands on the result of a run: score it, talk with it, write it as others serve it."""

import inspect
import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from corolla.cli.options import (
    EVALUATION,
    EXPORT,
    PORT,
    PROGRAM,
    AsJson,
    Given,
    NewFolder,
    Set,
    takes,
)
from corolla.cli.screen import out, say
from corolla.edits import grammar
from corolla.errors import ConfigError
from corolla.host.heap import importing


@takes(instead=EVALUATION)
def evaluate(
    *,
    adapter: Annotated[Path, typer.Argument(help="A run's folder, or its adapter/ or model/.")],
    model: Annotated[str | None, typer.Option(help="Default: the one it was trained on.")] = None,
    data: Annotated[str | None, typer.Option(help="Default: the data of its run.")] = None,
    instead: Given,
    as_json: AsJson = False,
    settings: Set = None,
) -> None:
    """Score an adapter beside its base model on held-out examples, with plain PEFT."""
    with importing():
        from corolla.commands.artefacts import evaluate_adapter, evaluate_tasks, print_scores

    tasks, drift = instead["tasks"], instead["drift"]
    if tasks is not None and drift:
        raise ConfigError("--tasks and --drift measure different things: ask for one at a time")
    if data and (drift or tasks is not None):
        flag = "--drift" if drift else "--tasks"
        raise ConfigError(f"{flag} bring their own data: leave out --data")
    if drift:
        from corolla.commands.drift import evaluate_drift, print_drift

        told = evaluate_drift(adapter, model, drift, settings or ())
        if as_json:
            print(json.dumps(told, indent=2))
        else:
            print_drift(out, told)
        return
    if tasks is not None:
        names = [name for name in tasks.split(",") if name]
        scores = evaluate_tasks(adapter, model, names, instead["limit"], settings or ())
    else:
        tell = typer.echo if not as_json else partial(typer.echo, err=True)
        scores = evaluate_adapter(adapter, model, data, settings or (), tell)
    if as_json:
        print(json.dumps(scores, indent=2))
    else:
        print_scores(out, scores)


def chat(
    result: Annotated[
        Path,
        typer.Argument(metavar="RUN|ADAPTER", help="A run's folder, or its adapter/ or model/."),
    ],
    model: Annotated[str | None, typer.Option(help="Default: the one it was trained on.")] = None,
    once: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="Answer this and end: for scripts.")
    ] = None,
    system: Annotated[str, typer.Option(help="An instruction before each conversation.")] = "",
    as_json: AsJson = False,
    settings: Set = None,
) -> None:
    """Ask a result and its base model the same, and see both answers side by side."""
    if as_json and once is None:
        raise ConfigError("--json is for one prompt: add --once PROMPT")
    if once is not None and not once.strip():
        raise ConfigError("--once needs a prompt, found an empty one")
    if once is None and not sys.stdin.isatty():
        raise ConfigError("a conversation needs a terminal: ask once, with --once PROMPT")
    with out.status("loading"):
        from corolla.commands import chat as chatting

        opened = chatting.open_chat(result, model, settings or (), system)
    if once is None:
        chatting.talk(out, opened, lambda: input("> "))
        return
    answers = chatting.once(opened, once)
    if as_json:
        print(json.dumps(answers, indent=2, ensure_ascii=False))
        return
    for name, answer in answers.items():
        say(f"{name}: {answer or '(nothing)'}")


def edit(
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="Folders of runs, or of adapters of one base."),
    ],
    steps: Annotated[
        str,
        typer.Option(
            metavar="STEPS",
            help="In their order: a line with spaces between steps, a JSON list of them, or a "
            "FILE.json or FILE.toml (steps = [...]).",
        ),
    ],
    out_dir: NewFolder,
    model: Annotated[
        str | None, typer.Option(help="The base model; default: the one that adapters name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Combine, scale, trim and cut adapters, on the products of their factors.

    Steps act on what an adapter adds to each weight, not on its factors, so that two adapters that
    do the same are edited alike. docs/after.md says which to use when.
    """
    with out.status("loading"):
        from corolla.commands.edit import edit as editing

        done = editing.edit(editing.Order(adapters, steps, out_dir, model))
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
    else:
        say(done.line)


edit.__doc__ = f"{inspect.cleandoc(edit.__doc__ or '')}\n\n{grammar.explained()}"


@takes(measured=PORT)
def port(
    *,
    adapter: Annotated[Path, typer.Argument(help="A run's folder, or its adapter/.")],
    to: Annotated[str, typer.Option(metavar="MODEL", help="The new version of its base.")],
    out_dir: NewFolder,
    measured: Given,
    as_json: AsJson = False,
    settings: Set = None,
) -> None:
    """Put an adapter on another version of its base, or refuse where that does harm."""
    with out.status("loading"):
        from corolla.commands.port import port as porting

        order = porting.Order(adapter, to, out_dir, settings=settings or (), **measured)
        done = porting.port(order)
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
        return
    for line in done.lines:
        say(line)


@takes(program=PROGRAM, written=EXPORT)
def export(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|ADAPTER|MODEL",
            help="A run's folder, or its adapter/ or model/; for executorch also a base model.",
        ),
    ],
    to: Annotated[
        Literal["merged", "adapter", "gguf", "executorch"],
        typer.Option(
            help="merged: a plain model folder; adapter: a PEFT adapter, with --rank a smaller "
            "one; gguf: files of llama.cpp, the adapter's and the merged model's; executorch: "
            "programs for native clients."
        ),
    ] = "merged",
    model: Annotated[str | None, typer.Option(help="Default: the one it was trained on.")] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="A new folder; default: ADAPTER-merged or so.")
    ] = None,
    written: Given,
    key: Annotated[
        Path | None, typer.Option(help="To sign with; made, with its .pub, where there is none.")
    ] = None,
    program: Given,
) -> None:
    """Write a result in the form that others serve, or a base as a signed bundle for phones."""
    targets: str | None = program.pop("target_modules")
    rank: int | None = program.pop("rank")
    options = {
        "targets": targets.split(",") if targets else None,
        "bases": program.pop("base"),
        **program,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if to == "executorch":
        if any(written.values()):
            raise ConfigError("--dtype and --push are for other forms than executorch")
        with out.status("loading") as shown:
            from corolla.phones import export as bundling

            request = bundling.ExportRequest(
                source=source, out=out_dir, key=key, model=model, rank=rank, **given
            )
            made = bundling.make(request, shown.update)
        say(bundling.summary(made, str(out_dir)))
        return
    if given or key:
        raise ConfigError(
            "--key, --target-modules, --length, --base and --serial are for --to executorch: leave "
            "them out"
        )
    with out.status("loading"):
        from corolla.commands.export import order as exporting

        asked = exporting.Order(Path(source), to, model, out_dir, rank=rank, **written)
        lines = exporting.export(asked)
    for line in lines:
        say(line)
