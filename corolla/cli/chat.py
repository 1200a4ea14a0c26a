"""The command that talks with a result."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from corolla.cli.options import AsJson, Set
from corolla.cli.screen import out, say
from corolla.errors import ConfigError


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
