"""Commands on the result of a run: score it, talk with it, write it as others serve it."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from corolla.cli.options import EXPORT, PROGRAM, AsJson, Given, Set, takes
from corolla.cli.screen import out, say
from corolla.errors import ConfigError
from corolla.host.heap import importing


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="A run's folder, or its adapter/ or model/.")],
    model: Annotated[str | None, typer.Option(help="Default: the one it was trained on.")] = None,
    data: Annotated[str | None, typer.Option(help="Default: the data of its run.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead: lm-evaluation-harness tasks, NAME,FILE.yaml,…"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task; for trials.")
    ] = None,
    as_json: AsJson = False,
    settings: Set = None,
) -> None:
    """Score an adapter beside its base model on held-out examples, with plain PEFT."""
    with importing():
        from corolla.commands.artefacts import evaluate_adapter, evaluate_tasks, print_scores

    if tasks is not None:
        if data:
            raise ConfigError("--tasks bring their own data: leave out --data")
        names = [name for name in tasks.split(",") if name]
        scores = evaluate_tasks(adapter, model, names, limit, settings or ())
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
