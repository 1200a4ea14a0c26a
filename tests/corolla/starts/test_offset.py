"""Federations whose start takes a part out of the base: what stays beside it, for everybody."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from corolla.aggregation.sums import WeightedMean
from corolla.client.training.worker import Worker
from corolla.commands.simulate.in_process import simulate
from corolla.config.build import build_strategy
from corolla.config.load import validate
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.interfaces import PricedByState, Stacking
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.round import evaluate_clients
from corolla.server.rounds.tasks import costs
from corolla.starts import table
from corolla.storage.memory import Memory
from corolla.strategies import offset
from corolla.strategies.listing import registry
from corolla.tensors import tree
from tests.conftest import Settings
from tests.corolla.starts.test_gradient import FOLLOW
from tests.strategies import tiny

BESIDE = [name for name in FOLLOW if name != "feddpa"] + ["fedprox", "fedavgm", "fedadam", "lisa"]
"""Strategies that go with a block."""


def started(config: RunConfig, kind: str, folder: Path) -> tiny.Run:
    """A federation that begins as the run's server lets it begin."""
    run = tiny.start(config, kind, folder)
    made = table.begin(run.model, run.model.init(config.lora, 0), config)
    run.state = run.first = made.state(run.federation.strategy, config.seed)
    return run


@pytest.mark.parametrize("name", [*BESIDE, "scaffold"])
def test_a_block_is_sent_once_stays_and_is_saved(name: str, tmp_path: Path) -> None:
    """Plain peft loads the stack on the unmodified base: the same logits, and for exact strategies
    the mean of what clients' models were."""
    run = started(tiny.config(name, start="pissa", weight_decay=0.0), "llama", tmp_path / "kept")
    block, strategy = run.state[offset.GROUP], run.federation.strategy
    members = dict.fromkeys(tiny.CLIENTS, 1)
    bare = {group: own for group, own in run.state.items() if group != offset.GROUP}
    usual, priced = (costs(run.federation, own, 1, members) for own in (bare, run.state))
    assert {a.once - b.once for a, b in zip(priced, usual, strict=True)} == {4 * tree.count(block)}
    run.step()
    assert all(offset.GROUP in seen for seen in run.network.received.values())
    before = set(run.network.received)
    run.step()
    again = before & run.network.received.keys()
    assert again
    assert not any(offset.GROUP in run.network.received[client] for client in again)
    assert tiny.same(run.state[offset.GROUP], block)
    wanted, found = run.network.mean(), tiny.saved(run, tmp_path / "adapter")
    if strategy.aggregates == "weights":
        assert tiny.relative(found, wanted) < 1e-6
    assert float(sum(t.norm() for t in found.values())) > 0
    plain = PeftModel.from_pretrained(tiny.base("llama").model, str(tmp_path / "adapter"))
    run.model.show(strategy.adapter(run.state), run.federation.config.lora)
    assert torch.allclose(tiny.logits(plain), tiny.logits(run.model.model), atol=1e-5)
    assert evaluate_clients(RoundCall(run.federation, run.state, run.held, 3), run.network)


def test_without_its_block_a_model_would_be_another(tmp_path: Path) -> None:
    run = started(tiny.config("fedavg", start="pissa"), "llama", tmp_path)
    spec, strategy = run.federation.config.lora, run.federation.strategy
    run.model.show(strategy.adapter(run.state), spec)
    whole = tiny.logits(run.model.model)
    bare = {group: own for group, own in run.state.items() if group != offset.GROUP}
    run.model.show(strategy.adapter(bare), spec)
    assert float((tiny.logits(run.model.model) - whole).abs().max()) > 1e-3
    assert torch.allclose(whole, tiny.logits(tiny.base("llama").model), atol=1e-5)


def test_one_client_alone_is_the_mean_of_itself(tmp_path: Path) -> None:
    run = started(tiny.config("fedavg", start="olora", cohort=1), "gpt2", tmp_path / "kept")
    run.step()
    ((own,),) = [list(run.network.dense.values())]
    assert tiny.relative(tiny.saved(run, tmp_path / "adapter"), own) < 1e-6


def test_clients_in_another_order_lead_to_the_same_model(tmp_path: Path) -> None:
    states = []
    for reverse in (False, True):
        config = tiny.config("fedex_lora", start="pissa")
        run = tiny.start(config, "llama", tmp_path / f"{reverse}", reverse=reverse)
        made = table.begin(run.model, run.model.init(config.lora, 0), config)
        run.state = made.state(run.federation.strategy, config.seed)
        run.step()
        states.append(tree.digest_all(run.state))
    assert states[0] == states[1]


def test_the_artefact_is_what_peft_makes_of_such_a_start(tmp_path: Path) -> None:
    """path_initial_model_for_weight_conversion: [B | B0] and [A ; -A0] of the same training."""
    run = started(tiny.config("fedavg", start="pissa"), "llama", tmp_path / "kept")
    given = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=list(run.model.shapes)
    )
    model = get_peft_model(tiny.base("llama").model, given)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "begun"))
    run.step()
    trained = run.state["adapter"]
    for module in run.model.shapes:
        layer = model.base_model.model.get_submodule(module)
        b = run.first["adapter"][module + ".lora_B"]
        signs = torch.sign((layer.lora_B["default"].weight * b).sum(0)).detach()
        layer.lora_A["default"].weight.data = signs[:, None] * trained[module + ".lora_A"]
        layer.lora_B["default"].weight.data = signs * trained[module + ".lora_B"]
    model.peft_config["default"].init_lora_weights = "pissa"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PiSSA changes the base weights")
        model.save_pretrained(
            str(tmp_path / "theirs"),
            path_initial_model_for_weight_conversion=str(tmp_path / "begun"),
        )
    theirs = tiny.peft_weights(
        PeftModel.from_pretrained(tiny.base("llama").model, str(tmp_path / "theirs"))
    )
    assert tiny.relative(tiny.saved(run, tmp_path / "ours"), theirs) < 1e-4


def test_a_strategy_stays_what_it_is() -> None:
    plain = registry.create("fedex_lora", {"residual_rank": 8})
    made = offset.beside(plain)
    assert offset.beside(made) is made
    assert made.name == "fedex_lora"
    assert made.residual_rank == 8  # type: ignore[attr-defined]
    assert isinstance(made, Stacking)
    assert isinstance(made, PricedByState)
    assert registry.traits(made) == registry.traits(plain)
    assert type(build_strategy(tiny.config("fedavg"))) is registry.find("fedavg")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": 0.01}, "weight-decay would shrink what is put in its place"),
        (
            {"strategy": "feddpa"},
            "start=pissa takes a part out of the base: models of strategy fed",
        ),
        ({"strategy": "flexlora"}, "clients of strategy flexlora begin from another"),
        ({"strategy": "flora"}, "clients of strategy flora begin from another"),
        ({"strategy": "hetlora"}, "clients of strategy hetlora begin from another"),
        ({"strategy": "fedmezo"}, "clients of strategy fedmezo begin from another"),
        ({"strategy": "seed_pool"}, "clients of strategy seed_pool begin from another"),
        (
            {
                "strategy": "mixed",
                "classes": {n: {"trainer": n} for n in ("first_order", "zeroth_order")},
            },
            "start=pissa takes a part out of the base: what clients without gradients move",
        ),
        ({"strategy": "fedex_lora", "max_rank": 16}, "max-rank would keep that part"),
        ({"codec_down": ["int8"]}, "codec-down would round that part"),
        ({"parameters": "bias"}, "start=pissa makes an adapter: found parameters=bias"),
        ({"quantization": "4bit"}, "start=pissa reads the weights of the base"),
        ({"start": "loftq"}, "start=loftq makes good what quantisation lost"),
        (
            {"start": "mica"},
            "factor that must not be trained: use strategy=ffa_lora strategy.train=A",
        ),
        ({"start": "mica", "strategy": "ffa_lora"}, "must not be trained: use strategy=ffa_lora"),
        ({"start": "channels"}, "must not be trained: use strategy=ffa_lora"),
        ({"start": "orthogonal", "rank": 3}, "halves the rank, found rank=3: use an even one"),
        ({"start": "pissa_0"}, "start: expected one of random, gradient, pissa"),
        ({"start": "eva"}, "start=eva needs public=FILE.jsonl"),
        (
            {
                "start": "eva",
                "public": "x.jsonl",
                "strategy": "ffa_lora",
                "options": {"train": "A"},
            },
            "start=eva leaves B at zero",
        ),
    ],
)
def test_what_does_not_go_with_a_start_is_refused_in_one_line(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        validate({"strategy": "fedavg", "start": "pissa", **changes})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": ["int8", "zstd"]},
        {"codec": ["top_k:0.1"]},
        {"dp": "client", "epsilon": 8.0, "strategy": "ffa_lora"},
        {"dp": "example", "epsilon": 8.0},
        {"robust": "median"},
        {"layers": "last:1"},
        {"codec_down": ["zstd"]},
        {"buffer": 2},
    ],
)
def test_what_goes_with_a_start_is_not_refused(changes: dict[str, Any]) -> None:
    assert validate({"strategy": "fedavg", "start": "pissa", **changes}).start == "pissa"


def test_a_device_that_is_told_of_no_start_trains_beside_the_block(tmp_path: Path) -> None:
    """`start` stays with the server: what a device is sent says all."""
    config = tiny.config("fedavg", start="pissa")
    run = started(config, "llama", tmp_path / "one")
    other = started(config, "llama", tmp_path / "other")
    untold = config.model_copy(update={"start": "random"})
    memory = Memory(tmp_path / "memory")
    other.network.worker = Worker(untold, other.model, tiny.data("llama"), memory)
    run.step()
    other.step()
    assert tree.digest_all(run.state) == tree.digest_all(other.state)


def test_clients_of_some_blocks_leave_the_others_as_they_are(tmp_path: Path) -> None:
    """In blocks that a class does not train, start and block cancel: no change, as it means."""
    classes = {"whole": {}, "top": {"layers": "last:1"}}
    config = tiny.config("ffa_lora", start="olora", classes=classes)
    run = tiny.start(config, "llama", tmp_path / "kept", blocks=2)
    made = table.begin(run.model, run.model.init(config.lora, 0), config)
    run.state = made.state(run.federation.strategy, config.seed)
    run.step()
    found = tiny.saved(run, tmp_path / "adapter", blocks=2)
    assert tiny.relative(found, run.network.mean()) < 1e-5


def test_noise_of_clients_is_added_to_what_is_learnt_alone(tmp_path: Path) -> None:
    config = tiny.config("ffa_lora", start="pissa", dp="client", epsilon=50.0, rounds=2)
    assert isinstance(build_strategy(config).aggregator(), WeightedMean)
    assert validate(config.model_dump()).begins.offset


def test_every_artefact_loads_in_plain_peft_in_another_process(tmp_path: Path) -> None:
    """All starts in one process that knows nothing of Corolla: the server's logits, on the base."""
    base = tiny.base("llama").model
    base.save_pretrained(str(tmp_path / "base"))
    wanted = {}
    for start in ("pissa", "olora", "orthogonal", "mica", "channels"):
        name = "ffa_lora" if start in ("mica", "channels") else "fedavg"
        options = {"train": "A"} if start == "mica" else {}
        run = started(tiny.config(name, start=start, options=options), "llama", tmp_path / start)
        run.step()
        adapter, spec = run.federation.strategy.adapter(run.state), run.federation.config.lora
        run.model.save(tmp_path / f"adapter-{start}", adapter, spec)
        run.model.show(adapter, spec)
        wanted[start] = tiny.logits(run.model.model)
    script = f"""
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.arange(2, 26).reshape(2, 12)
found = {{}}
for start in sys.argv[1:]:
    base = AutoModelForCausalLM.from_pretrained(r"{tmp_path / "base"}")
    model = PeftModel.from_pretrained(base, rf"{tmp_path}/adapter-{{start}}").eval()
    found[start] = model(input_ids=ids).logits.detach()
save_file(found, r"{tmp_path / "logits.safetensors"}")
"""
    subprocess.run([sys.executable, "-c", script, *wanted], check=True, cwd=tmp_path)
    found = load_file(str(tmp_path / "logits.safetensors"))
    for start, logits in wanted.items():
        assert float((found[start] - logits).abs().max()) < 1e-5, start
        assert float((logits - tiny.logits(base)).abs().max()) > 1e-4, start


def test_a_client_with_private_examples_trains_beside_the_block(tmp_path: Path) -> None:
    config = tiny.config("ffa_lora", start="pissa", dp="example", epsilon=50.0, rounds=2)
    run = started(config, "llama", tmp_path)
    run.step()
    assert all(offset.GROUP in seen for seen in run.network.received.values())


def test_a_run_is_resumed_to_the_same_bits(settings: Settings, tmp_path: Path) -> None:
    """Saved, and read by another process: what it computes is held against the server's."""
    wanted = settings(rounds=2, schedule="constant", start="pissa", codec=["int8"])
    whole = simulate(wanted, tmp_path / "whole")
    simulate(wanted.model_copy(update={"rounds": 1}), tmp_path / "half")
    resumed = simulate(wanted, tmp_path / "half", resume=True)
    assert resumed.adapter_hash == whole.adapter_hash
