"""The options of commands as tables, and how a command takes all options of a table."""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from corolla.cli.fields import Fields, FieldText, of_run, with_default
from corolla.trackers import TRACKERS

Config = Annotated[Path | None, typer.Option(help="TOML file with the same names.")]
NewFolder = Annotated[Path, typer.Option("--out", help="A new or empty folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on in --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other key: corolla keys explains all."),
]

Given = dict[str, Any]
"""The values of a table's options, by name."""


class Option(NamedTuple):
    """An option of a command; its flag follows from its name where `flags` has none."""

    kind: Any
    """The type that its text is read as, or the field that says it."""
    help: str
    """The text in --help; "": that of its field."""
    default: Any = None
    """The value where none is given; `...` marks an option that must be given."""
    flags: tuple[str, ...] = ()
    more: Mapping[str, Any] = {}
    """Other arguments of `typer.Option`: min, max, metavar."""
    usual: str = ""
    """The default in effect, in words; "": the value itself."""

    def parameter(self, name: str) -> inspect.Parameter:
        """The option as typer finds it in the signature of a function."""
        kind, text, more = self.kind, self.help, dict(self.more)
        if isinstance(kind, FieldText):
            more["click_type"] = FieldText(kind.key, kind.fields, self.usual)
            kind = Any
        elif self.usual:
            text, more["show_default"] = with_default(text, self.usual), False
        option = typer.Option(self.default, *self.flags, help=text, **more)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind
        )


Table = Mapping[str, Option]


def takes(**tables: Table) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of tables, in the places of the parameters of these names.

    The command gets the values of each table as one dict.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            if name in tables:
                parameters += [option.parameter(key) for key, option in tables[name].items()]
            else:
                parameters.append(parameter)

        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {
                name: {key: given.pop(key) for key in table} for name, table in tables.items()
            }
            command(**given, **values)

        del run.__wrapped__  # typer would take the signature of that
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def keys(fields: Fields, *names: str) -> Table:
    """Options that are keys: their types, defaults in effect and texts are those of the fields."""
    return {name: Option(FieldText(name, fields), "") for name in names}


RUN: Table = keys(
    of_run,
    *("strategy", "model", "data", "clients", "cohort", "rounds", "local_steps", "batch_size"),
    *("lr", "rank", "alpha", "seed", "engine", "dp", "epsilon", "delta", "clip"),
)
"""Keys of a run that are options; all others are given with --set."""


def run_options(*left_out: str, usual: Mapping[str, str] = {}, **helps: str) -> Table:
    """The options of RUN but those left out.

    `helps` are texts, and `usual` defaults in effect, of those that mean something else here.
    """
    return {
        name: option._replace(
            help=helps.get(name, option.help), usual=usual.get(name, option.usual)
        )
        for name, option in RUN.items()
        if name not in left_out
    }


FAIL_ON_WARNING = Option(
    bool, "Exit with 1 when a run warns of anything.", False, flags=("--fail-on-warning",)
)

SIMULATION: Table = {
    "keep_updates": Option(
        bool, "Keep every client's adapter as a PEFT folder.", False, flags=("--keep-updates",)
    ),
    "track": Option(list[str] | None, f"{', '.join(TRACKERS)}; repeatable."),
    "fail_on_warning": FAIL_ON_WARNING,
}
"""Options of `corolla simulate`: updates to keep, trackers to tell, warnings as errors."""

SEARCH: Table = {
    "seeds": Option(int, "Runs of each strategy; 1 allows no claim.", 3),
    "lrs": Option(
        str,
        "Learning rates that all try.",
        "",
        usual="the usual one × 1/3, 1, 3",
        more={"metavar": "A,B,C"},
    ),
    "jobs": Option(int, "Runs at a time; 0: as cores and memory allow.", 0),
    "baselines": Option(
        str,
        "Also: each client alone (local), one client with all rows (global).",
        "",
        flags=("--with",),
        more={"metavar": "local,global"},
    ),
    "fail_on_warning": FAIL_ON_WARNING,
}
"""How `corolla compare` searches."""

CANARIES: Table = {
    "canaries": Option(int, "There or not, by a coin each.", 1000, more={"min": 1}),
    "guesses": Option(int | None, "Of coins.", more={"min": 1}, usual="a fifth of the canaries"),
    "unit": Option(Literal["example", "client"] | None, "What canaries are with dp=none."),
}
"""Options of `corolla audit`: the canaries and the guesses that it tries."""

PROGRAM: Table = {
    "rank": Option(
        int | None,
        "LoRA rank: of programs; else at most this, the error is told.",
        more={"min": 1},
        usual="the adapter's; of programs 8 without one",
    ),
    "target_modules": Option(
        str | None,
        "Layers with an adapter.",
        more={"metavar": "A,B"},
        usual="the adapter's, or all linear ones",
    ),
    "layers": Option(
        str | None,
        "Blocks with an adapter, as the key of runs.",
        more={"metavar": "last:4"},
        usual="the adapter's, or all",
    ),
    "length": Option(int | None, "Tokens of a sequence, at most.", usual="256"),
    "base": Option(str | None, "fp32, q4 or fp32,q4.", usual="fp32,q4"),
    "serial": Option(
        int | None,
        "Of the bundle: phones refuse a lower one than they have seen.",
        usual="seconds since 1970",
    ),
}
"""Options of the programs that `corolla export --to executorch` makes."""

EVALUATION: Table = {
    "tasks": Option(str | None, "Instead: lm-evaluation-harness tasks, NAME,FILE.yaml,…"),
    "limit": Option(int | None, "Documents of each task; for trials.", more={"min": 1}),
    "drift": Option(
        list[str] | None,
        "Instead: what tuning has changed beside its task, on rows of FILE or NAME=FILE, or on "
        "refusals, knowledge, texts or all, which ship with Corolla; repeatable.",
        more={"metavar": "[NAME=]FILE"},
    ),
}
"""Options of `corolla evaluate`: what is measured instead of held-out rows."""

PORT: Table = {
    "model": Option(str | None, "Default: the one it was trained on."),
    "data": Option(str | None, "Rows to measure on; default: held-out ones of its run."),
    "force": Option(
        bool, "Also where it is unmeasured, or makes things worse.", False, flags=("--force",)
    ),
}
"""Options of `corolla port`: the old base, what it is measured on, harm as no reason."""

EXPORT: Table = {
    "dtype": Option(
        str | None,
        "Of weights: float32, bfloat16 or float16 of merged, streamed file by file; f32, f16 or "
        "q8_0 of gguf.",
        usual="float32, and f16",
    ),
    "push": Option(
        str | None, "Also to this repository of a model hub.", more={"metavar": "OWNER/NAME"}
    ),
}
"""How `corolla export` writes other forms than programs."""

SERVER: Table = {
    "address": Option(str | None, "HOST:PORT for clients.", usual="0.0.0.0:9092"),
    "certificates": Option(
        Path | None, "Folder of server.pem: see corolla certs.", flags=("--certs",)
    ),
    "clients_keys": Option(Path | None, "Folder of clients' public keys, *.pub; watched."),
    "metrics_port": Option(int | None, "Prometheus, on loopback.", usual="none"),
    "min_clients": Option(int | None, "To wait for before round 1.", usual="1"),
    "fail_on_warning": FAIL_ON_WARNING,
}
"""The machine that `corolla server` runs on."""

_ALLOW = Option(list[str] | None, "FILE.py:Class a server may name as strategy; repeatable.")
_EPSILON = Option(float | None, "Its examples may cost, in all runs.", usual="any")
_DELTA = Option(float | None, "Of that.", usual="1e-05")
_THREADS = Option(int, "Of the CPU; 0: all.", 0)
_RUN_DISK = Option(str | None, "That one run may keep, at most.", usual="2GB")
_SERVER = Option(str | None, "corolla server.", more={"metavar": "HOST:PORT"})
_ROOTS = Option(Path | None, "ca.pem of the server.", usual="the system's")

_READING: Table = {
    "columns": Option(
        list[str] | None, "Its column for one of ours: prompt=body; repeatable.", usual="as ours"
    ),
    "splits": Option(
        list[str] | None, "Its split for one of ours: train=all; repeatable.", usual="as ours"
    ),
    "subset": Option(str | None, "The configuration of a hub's set.", usual="the only one"),
}

DEVICE: Table = {
    "server": _SERVER,
    "root_certificates": _ROOTS,
    "data": Option(str | None, "Its own rows, a file or folder, for training and evaluation."),
    **_READING,
    "name": Option(str | None, "In the federation.", usual="made from the key"),
    "model": Option(str | None, "The run's: hub name, folder, .gguf.", usual="embedded"),
    "state": Option(Path | None, "Key, logs, what is kept.", usual="~/.local/state/corolla"),
    "memory": Option(str | None, "For training, at most: 2GB.", usual="any"),
    "run_disk": _RUN_DISK,
    "disk": Option(str | None, "That all runs may keep, at most.", usual="8GB"),
    "threads": _THREADS,
    "device": Option(str | None, "cpu, cuda, mps.", usual="the best there is"),
    "quantization": Option(str | None, "none, 8bit or 4bit.", usual="none"),
    "micro_batch_size": Option(int, "At most; 0: as the run says.", 0),
    "gradient_checkpointing": Option(
        bool,
        "Less memory, more time.",
        False,
        flags=("--gradient-checkpointing",),
    ),
    "epsilon": _EPSILON,
    "delta": _DELTA,
    "allow": _ALLOW,
}
"""The device that `corolla client` runs on."""

GATEWAY: Table = {
    "server": _SERVER._replace(kind=str, default=...),
    "listen": Option(
        str,
        "For phones: 0.0.0.0:9443.",
        ...,
        more={"metavar": "HOST:PORT"},
    ),
    "certificate": Option(Path, "Shown to phones: see corolla certs.", ...),
    "key": Option(Path, "Of the certificate.", ...),
    "tokens": Option(Path, "One a line: TOKEN, or TOKEN DEVICE.", ...),
    "name": Option(str, "In the federation; phones are NAME/DEVICE.", ...),
    "state": Option(Path, "Folder of the key, the logs and what is kept.", ...),
    "root_certificates": _ROOTS,
    "share_model": Option(Path | None, "A base model's folder, for phones that have none."),
    "share_bundle": Option(Path | None, "Programs for native phones: corolla export makes them."),
    "publisher": Option(Path | None, "Public key that the bundle must be signed with."),
    "policy": Option(
        str,
        "Asked of phones: these, battery=20, thermal=3, storage=100MB, examples=8, "
        "separation=2, period=24h, daily-bytes=50MB, daily-seconds=1800, daily-battery=5; none.",
        "charging,unmetered,idle",
    ),
    "over_select": Option(
        float,
        "Phones at work for each update wanted.",
        1.3,
        more={"min": 1.0, "max": 10.0},
    ),
    "seats": Option(
        int,
        "Updates it promises at a time; 0: as many as phones come.",
        0,
        more={"min": 0},
    ),
    "retry": Option(
        float,
        "Seconds between a phone's check-ins.",
        10.0,
        more={"min": 0.1, "max": 3600},
    ),
    "lease": Option(
        float,
        "Seconds a phone may be silent at work.",
        60.0,
        more={"min": 1, "max": 3600},
    ),
    "allow": _ALLOW,
}
"""A gateway: who it is, what it gives to phones, and what it asks of them."""

PHONE: Table = {
    "gateway": Option(str, "corolla gateway.", ..., more={"metavar": "HOST:PORT"}),
    "token_file": Option(Path, "What the gateway's owner gave.", ...),
    "data": Option(str, "Its own rows, a file or folder, for training and evaluation.", ...),
    **_READING,
    "root_certificates": Option(Path | None, "ca.pem of the gateway.", usual="the system's"),
    "name": Option(str | None, "In the federation.", usual="made once, kept in --state"),
    "model": Option(str | None, "Hub name, folder, 'embedded'.", usual="the gateway's"),
    "state": Option(
        Path | None, "Models, logs, what is kept.", usual="~/.local/state/corolla/phone"
    ),
    "run_disk": _RUN_DISK,
    "disk": Option(str | None, "All runs, with the gateway's model, at most.", usual="8GB"),
    "threads": _THREADS,
    "epsilon": _EPSILON,
    "delta": _DELTA,
}
"""The device that `corolla phone` runs on."""

CONDITIONS: Table = {
    "charging": Option(bool | None, "Power.", flags=("--charging/--on-battery",), usual="as found"),
    "metered": Option(bool | None, "Network.", flags=("--metered/--unmetered",), usual="as found"),
    "idle": Option(bool | None, "Use.", flags=("--idle/--in-use",), usual="idle"),
}
"""The state that a phone is in."""
