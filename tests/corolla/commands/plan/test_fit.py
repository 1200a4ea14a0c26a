"""`corolla plan --fit`: what is printed is the most that fits, and `corolla plan` agrees."""

import itertools
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from corolla.budgets.devices import Limits, Way
from corolla.cli.app import app
from corolla.commands.plan import fit as fitting
from corolla.commands.plan.plan import plan
from corolla.config.load import load, validate
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.models import anatomy

SMALL: dict[str, Any] = {
    **{"clients": 4, "cohort": 2, "rounds": 2, "local_steps": 2, "batch_size": 4, "rank": 4},
    **{"eval_examples": 8, "eval_clients": 2, "eval_client_examples": 4, "max_length": 64},
    "threads": 1,
}
LLAMA_1B = {
    **{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64},
    **{"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": True},
}


def settings(**changes: Any) -> RunConfig:
    return validate({**SMALL, **changes})


def pasted(config: RunConfig, found: fitting.Fit, folder: Path) -> RunConfig:
    """The configuration of a run whose file got the printed lines where these say.

    Keys of the run in place of others above the first table, whole tables in place of others.
    """
    own = config.model_dump(mode="json", exclude={"options"}, exclude_unset=True)
    printed = tomllib.loads(found.lines())
    classes = {**own.pop("classes", {}), **printed.pop("classes", {})}
    path = folder / "run.json"
    path.write_text(json.dumps({**own, **printed, "classes": classes}))
    return validate(json.loads(path.read_text()))


@pytest.mark.parametrize(
    "limits", ["memory=480MB", "bytes=30kB", "memory=490MB,bytes=20kB", "bytes=12kB"]
)
def test_the_plan_of_what_is_printed_is_within_all_limits(limits: str, tmp_path: Path) -> None:
    config = settings()
    found = fitting.fit(config, [limits])
    told = plan(pasted(config, found, tmp_path))
    asked = found.found[""].limits
    assert told.memory.client.total <= (asked.memory or told.memory.client.total)
    assert told.traffic.up[1] <= (asked.bytes or told.traffic.up[1])
    assert found.found[""].need.within(asked)


def test_classes_have_limits_of_their_own(tmp_path: Path) -> None:
    config = settings(classes={"phone": {"share": 3}, "laptop": {}})
    found = fitting.fit(config, ["phone:bytes=40kB", "laptop:memory=2GB"])
    run = pasted(config, found, tmp_path)
    assert run.rank == 4
    assert run.classes["laptop"].layers is None
    assert run.classes["phone"].layers == "last:1"
    told = plan(run)
    assert told.traffic.up[0] <= 40_000
    assert run.classes["phone"].rank is None, "fedavg has one rank for all"
    assert run.classes["phone"].share == 3, "the table that is replaced said so"


def test_each_printed_line_says_where_it_belongs() -> None:
    """Keys of the run come before all tables, and a comment of its own before each kind."""
    config = settings(classes={"phone": {"share": 3, "layers": "first:2"}, "laptop": {}})
    lines = fitting.fit(config, ["phone:bytes=40kB"]).lines().splitlines()
    keys = lines.index(
        "# keys of the run, in place of those of these names, above the first [table]:"
    )
    tables = lines.index(
        "# whole tables, in place of those of these names, below all keys of the run:"
    )
    assert lines[keys + 1].startswith("rank = ") and lines[tables + 1] == "[classes.phone]"
    assert "corolla client --micro-batch-size 4 --quantization none" in lines[tables + 2]
    assert lines[tables + 3 :] == ["share = 3", 'layers = "1"']
    assert not any(line.startswith("[") for line in lines[:tables])


def test_ranks_are_of_a_class_where_the_strategy_has_them(tmp_path: Path) -> None:
    config = settings(strategy="flora", classes={"phone": {}, "laptop": {}})
    found = fitting.fit(config, ["phone:bytes=12kB", "laptop:memory=2GB"])
    run = pasted(config, found, tmp_path)
    phone, laptop = run.classes["phone"], run.classes["laptop"]
    assert phone.rank is not None and laptop.rank == 4
    assert found.found["phone"].need.bytes <= 12_000


def test_without_limits_everything_is_trained_at_the_largest_rank() -> None:
    found = fitting.fit(settings(), ["memory=64GB"]).settings()
    assert found == {"rank": 4, "micro_batch_size": 4, "dtype": "float32"}


@pytest.mark.parametrize(
    ("limits", "what"),
    [("memory=1MB", "memory=1.0 MB"), ("bytes=10B", "bytes=10 B"), ("seconds=0.001,flops=1e6", "")],
)
def test_where_nothing_fits_one_line_says_what_is_needed(limits: str, what: str) -> None:
    with pytest.raises(ConfigError, match=f"nothing fits clients with {what}") as why:
        fitting.fit(settings(), [limits])
    assert "\n" not in str(why.value) and "seed_pool, or mixed for some" in str(why.value)


def test_seconds_are_those_of_steps_and_of_what_travels() -> None:
    """At a billion operations a second, and a class that sends 1000 bytes a second."""
    config = settings(classes={"phone": {"upload": 1000.0}, "laptop": {}})
    found = fitting.fit(config, ["phone:flops=1e9,seconds=1000", "laptop:flops=1e9,seconds=1000"])
    phone, laptop = found.found["phone"].need, found.found["laptop"].need
    assert phone.seconds - phone.bytes / 1000 == pytest.approx(laptop.seconds)
    twice = fitting.fit(config, ["laptop:flops=2e9,seconds=1000"]).found["laptop"].need
    assert twice.seconds == pytest.approx(laptop.seconds / 2)


@pytest.mark.parametrize("names", [["memory"], ["bytes"], ["seconds"], ["memory", "seconds"]])
def test_no_other_set_of_blocks_rank_or_batch_trains_more(names: list[str]) -> None:
    """All sets of blocks, not only the last ones, with all ranks and micro-batches."""
    config, model = settings(), anatomy.read("embedded")
    free = fitting.device(config, model, "", Limits(), 1e9)
    numbers = free.numbers
    least = free.least("float32", "none")
    most = free.need(Way(numbers, 4, 1, "float32", "none"))
    between = {
        n: type(getattr(least, n))((getattr(least, n) + getattr(most, n)) / 2) for n in names
    }
    limits = Limits(**between)
    device = replace(free, limits=limits)
    best = max(
        (found[0].value for rank in (4, 2, 1) if (found := device.best(rank, "float32", "none"))),
        default=0,
    )
    every = [
        way.value
        for size in range(1, len(numbers) + 1)
        for blocks in itertools.combinations(numbers, size)
        for rank in (4, 2, 1)
        for micro in (4, 2, 1)
        if device.need(way := Way(blocks, rank, micro, "float32", "none")).within(limits)
    ]
    assert 0 < best == max(every) < 4 * len(numbers)


def test_a_model_of_a_billion_parameters_from_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B))
    assert anatomy.read(str(tmp_path)).values == 1_235_814_400
    config = settings(model=str(tmp_path), rank=8)
    found = fitting.fit(config, ["memory=3GB,bytes=10MB,seconds=900,flops=200e9"])
    own = found.found[""]
    assert own.need.within(own.limits)
    told = plan(pasted(config, found, tmp_path))
    assert told.memory.client.total <= 3_000_000_000
    assert told.traffic.up[1] <= 10_000_000


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--fit", "memory=2"], "memory=2"),
        (["--fit", "speed=2"], "expected each of memory, bytes, seconds, flops once"),
        (["--fit", "phone=1GB"], "found phone=1GB: write --fit memory=1GB, or of a class --fit ph"),
        (["--fit", "phone:memory=2GB"], "a table [classes.phone] in the file or by --set classes."),
        (["--fit", ":memory=2GB"], "the run has no classes: --fit memory=2GB"),
        (
            ["--fit", "memory=2GB", "--set", "classes.tv.share=1"],
            "the run has classes tv: name one, as --fit tv:memory=2GB",
        ),
        (["--fit", "seconds=-1"], "seconds is more than 0"),
        (["--fit", "memory=2GB", "--set", "parameters=bias"], "found parameters=bias"),
        (["--fit", "memory=2GB", "--strategy", "seed_pool"], "--fit is for first-order clients"),
        (["--fit", "memory=2GB", "--set", 'new-tokens=["<a>"]'], "--fit is for linear layers"),
        (["--fit", "seconds=9", "--set", "local-epochs=1"], "set local-steps"),
        (["--fit", "memory=2GB", "--set", "budget=flops:0.5"], "--fit chooses what budget"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(arguments: list[str], why: str) -> None:
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == 2
    assert why in " ".join(done.output.split())


def test_the_command_prints_lines_and_json() -> None:
    asked = ["plan", "--fit", "bytes=30kB", "--set", "max-length=64"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0
    run = load(None, {}, [f"{k}={v}" for k, v in tomllib.loads(done.output).items()])
    assert run.layers is not None
    told = json.loads(CliRunner().invoke(app, [*asked, "--json"]).output)
    assert told["settings"] == tomllib.loads(done.output)
    assert told["classes"][""]["needs"]["bytes"] <= 30_000
