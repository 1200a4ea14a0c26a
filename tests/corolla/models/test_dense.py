import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.ia3 import IA3Layer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from typer.testing import CliRunner

from corolla import seeds
from corolla.cli.app import app
from corolla.client.training.first_order import FirstOrder
from corolla.client.training.worker import Worker
from corolla.commands import artefacts
from corolla.commands.export.merged import export_merged
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.config.sections.kinds import KindName
from corolla.data.encoding import Encoded, Encoder
from corolla.directions.pools import SignPool
from corolla.errors import ArtefactError, DivergedError, ModelError
from corolla.evaluation import scoring
from corolla.models import parts, pretrained, trainable
from corolla.models.dense import DenseModel
from corolla.models.files import adapter_files
from corolla.models.full import FullModel
from corolla.models.pretrained import Base
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, run_round
from corolla.storage.memory import Memory
from corolla.types import Adapter, LoraSpec, Move, Params, Payload
from corolla.wire import messages
from corolla.wire.messages import unpack_reply
from corolla.wire.packet import Packet
from tests.strategies import tiny

Settings = Callable[..., RunConfig]
SPEC = LoraSpec(1, 1.0)
TOKENS = 3
"""Virtual tokens in these tests."""
POOL = SignPool(64, (5, 1))

# (model, role) → values that are trained, counted by hand from the sizes in tiny.py.
SIZES: dict[tuple[str, KindName], int] = {
    ("llama", "ia3"): 16 + 16 + 48,  # outputs of k and v, inputs of down
    ("llama", "prompt"): TOKENS * 32,
    ("llama", "full"): 64 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 3 * 32,
    ("gpt2", "ia3"): 96 + 128,  # outputs of c_attn, inputs of mlp.c_proj
    ("gpt2", "prompt"): TOKENS * 32,
    ("gpt2", "bias"): (96 + 32) + (128 + 32) + 3 * 32,
    ("llama", "norm"): 3 * 32,
    ("gpt2", "norm"): 3 * 2 * 32,
    ("bert", "ia3"): 32 + 32 + (32 + 48) + (3 * 32 + 3),  # outputs of k and v, two inputs, head
    ("bert", "bias"): 4 * 32 + (48 + 32) + 3 * 32 + 32 + (3 * 32 + 3),
    ("bert", "norm"): 3 * 2 * 32 + (3 * 32 + 3),
    ("bert", "head"): 3 * 32 + 3,
    ("untied", "head"): 64 * 32,
    ("llama", "embeddings"): 64 * 32,
    ("untied", "embeddings"): 64 * 32,
    ("bert", "embeddings"): 64 * 32 + (3 * 32 + 3),
}
TABLES = {
    "bert": "bert.embeddings.word_embeddings.weight",
    **dict.fromkeys(("llama", "untied"), "model.embed_tokens.weight"),
}
"""Model → the name of its table of the embeddings of tokens."""
CASES = [*SIZES, ("gpt2", "full"), ("bert", "full")]


def untied() -> Base:
    """The Llama with an output layer of its own."""
    tied = tiny.base("llama")
    config = tied.model.config
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(8)
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    return dataclasses.replace(tied, model=model, fingerprint=pretrained.fingerprint(model))


def base(kind: str) -> Base:
    return untied() if kind == "untied" else tiny.base(kind)


def dense(kind: str, role: KindName) -> DenseModel:
    return DenseModel(base(kind), role, virtual_tokens=TOKENS)


def moved(model: DenseModel, seed: int = 1) -> Params:
    """Trained tensors as after training: none is where it started."""
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=seeds.generator(seed, name))
        for name, tensor in model.init(SPEC, 0).items()
    }


def untrained(model: DenseModel) -> Params:
    """A copy of everything in the model but what is trained; of tied tensors the first."""
    trained = {leaf.data_ptr() for _, leaf in model.parameters()}
    return {
        name: tensor.clone()
        for name, tensor in [*model.model.named_parameters(), *model.model.named_buffers()]
        if tensor.data_ptr() not in trained
    }


def norms(model: nn.Module) -> set[str]:
    """Parameters of the modules whose class is a normalisation, by transformers and torch."""
    return {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm")
        for own, _ in module.named_parameters(recurse=False)
    }


def batch_of(kind: str, rows: int = 4) -> list[Encoded]:
    own = tiny.data(kind)
    encoder = Encoder(base(kind).tokenizer, own.labels, 32)
    examples = [e for split in own.clients.values() for e in split.train]
    encoded = [s for example in examples for s in encoder(example)]
    return [
        Encoded(s.input_ids[: 4 + i], s.labels if isinstance(s.labels, int) else s.labels[: 4 + i])
        for i, s in enumerate(encoded[:rows])
    ]


def padded(batch: Sequence[Encoded]) -> dict[str, Tensor]:
    """A batch made by hand; the first token has no context and is no target."""
    longest = max(len(s.input_ids) for s in batch)
    made = {
        "input_ids": torch.tensor(
            [[*s.input_ids, *[0] * (longest - len(s.input_ids))] for s in batch]
        ),
        "attention_mask": torch.tensor(
            [[1] * len(s.input_ids) + [0] * (longest - len(s.input_ids)) for s in batch]
        ),
    }
    if isinstance(batch[0].labels, int):
        return made | {"labels": torch.tensor([s.labels for s in batch])}
    rows = [
        [-100, *s.labels[1:], *[-100] * (longest - len(s.labels))]
        for s in batch
        if not isinstance(s.labels, int)
    ]
    return made | {"labels": torch.tensor(rows)}


def same(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def apart(one: Params, other: Params) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max()) for n in one)


def plain_peft(kind: str, role: str, params: Params) -> PeftModel:
    """The model as a user of peft alone would make it, standing at `params`."""
    own = base(kind)
    head = {n: t for n, t in params.items() if ".ia3" not in n and n != "prompt.weight"}
    with torch.no_grad():
        for name, tensor in head.items():
            own.model.get_parameter(name).copy_(tensor)
    config: Any = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    if role == "ia3":
        task = "SEQ_CLS" if own.task == "classify" else "CAUSAL_LM"
        config = IA3Config(task_type=task, fan_in_fan_out=kind == "gpt2")
    with torch.random.fork_rng(devices=[]), adapter_files.peft_speaks_to_transformers():
        made = get_peft_model(own.model, config)
    with torch.no_grad():
        for name, parameter in peft_tensors(made).items():
            parameter.copy_(params[name])
    return made.eval()


def peft_tensors(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """What peft trains, by our names."""
    if "prompt_encoder" in dict(model.named_children()):
        return {"prompt.weight": model.prompt_encoder["default"].embedding.weight}
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, IA3Layer):
            found[f"{name}.ia3"] = module.ia3_l["default"]
        if hasattr(module, "modules_to_save"):
            for own, parameter in module.modules_to_save["default"].named_parameters():
                found[f"{name}.{own}"] = parameter
    return found


def oracle_gradients(kind: str, role: str, params: Params, batch: Sequence[Encoded]) -> Params:
    """Gradients of transformers' own loss, by plain autograd or plain peft."""
    if role in ("ia3", "prompt"):
        model = plain_peft(kind, role, params)
        leaves: Mapping[str, Tensor] = peft_tensors(model)
        for leaf in leaves.values():
            leaf.requires_grad_(True)
        loss = model(**padded(batch)).loss
    else:
        plain = base(kind).model
        leaves = {n: t.clone().requires_grad_() for n, t in params.items()}
        loss = functional_call(plain, dict(leaves), kwargs=padded(batch)).loss
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


# What is trained


@pytest.mark.parametrize(("kind", "role"), CASES)
def test_the_values_that_are_trained_are_those_of_the_role(kind: str, role: KindName) -> None:
    model = dense(kind, role)
    fresh = model.init(SPEC, 0)
    named = dict(base(kind).model.named_parameters())
    head = {n for n in named if n.startswith("classifier.")} if kind == "bert" else set()
    wanted = {
        "bias": {n for n in named if n.endswith(".bias")} | head,
        "norm": norms(base(kind).model) | head,
        "head": head or {"lm_head.weight"},
        "embeddings": {TABLES[kind]} | head if kind in TABLES else set(),
        "full": set(named),
        "prompt": {"prompt.weight"},
    }
    if role == "ia3":
        assert {n for n in fresh if not n.endswith(".ia3")} == head
    else:
        assert fresh.keys() == wanted[role]
    total = sum(tensor.numel() for tensor in fresh.values())
    assert total == SIZES.get((kind, role), sum(t.numel() for t in named.values()))
    assert list(dict(model.parameters())) == sorted(fresh)
    assert all(tensor.dtype == torch.float32 for tensor in fresh.values())
    model.check_rank(LoraSpec(10_000, 1.0))


def test_ia3_scales_what_the_paper_scales() -> None:
    """Keys and values at their outputs; feed-forward activations, the input of the second layer."""
    layer = "model.layers.0"
    shapes = {n: tuple(t.shape) for n, t in dense("llama", "ia3").init(SPEC, 0).items()}
    assert shapes == {
        f"{layer}.self_attn.k_proj.ia3": (16, 1),
        f"{layer}.self_attn.v_proj.ia3": (16, 1),
        f"{layer}.mlp.down_proj.ia3": (1, 48),
    }
    shapes = {n: tuple(t.shape) for n, t in dense("gpt2", "ia3").init(SPEC, 0).items()}
    assert shapes == {
        "transformer.h.0.attn.c_attn.ia3": (96, 1),
        "transformer.h.0.mlp.c_proj.ia3": (1, 128),
    }


def test_ia3_scales_the_targets_that_are_named() -> None:
    model = DenseModel(tiny.base("llama"), "ia3", ["q_proj", "mlp.down_proj"])
    assert model.targets == ["q_proj", "mlp.down_proj"]
    layer = "model.layers.0"
    names = {f"{layer}.self_attn.q_proj.ia3", f"{layer}.mlp.down_proj.ia3"}
    assert model.init(SPEC, 0).keys() == names
    with pytest.raises(ModelError, match="nope match nothing in llama: its linear layers are"):
        DenseModel(tiny.base("llama"), "ia3", ["q_proj", "nope"])


@pytest.mark.parametrize(("kind", "role"), CASES)
def test_the_start_is_the_base_model(kind: str, role: KindName) -> None:
    """A prompt apart, which starts from words."""
    wanted = tiny.logits(base(kind).model)
    model = dense(kind, role)
    model.write(moved(model), SPEC)
    assert not torch.equal(tiny.logits(model.model)[:, -12:], wanted)
    model.write(model.init(SPEC, 0), SPEC)
    if role == "prompt":
        table = base(kind).model.get_input_embeddings().weight
        rows = model.init(SPEC, 0)["prompt.weight"]
        assert all(bool((table == row).all(dim=1).any()) for row in rows)
        assert same(model.init(SPEC, 4), dense(kind, role).init(SPEC, 4))
        assert not same(model.init(SPEC, 4), model.init(SPEC, 5))
    else:
        assert torch.equal(tiny.logits(model.model), wanted)


@pytest.mark.parametrize(
    ("kind", "role", "says"),
    [
        ("llama", "bias", "llama has no bias vectors; use lora"),
        ("llama", "head", "llama is tied to its input embeddings"),
        ("gpt2", "head", "gpt2 is tied to its input embeddings"),
        ("bert", "prompt", "bert is a classifier"),
    ],
)
def test_models_without_such_tensors_are_refused(kind: str, role: KindName, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        dense(kind, role)
    assert "\n" not in str(caught.value)


def test_a_model_whose_normalisations_have_no_weights_is_refused() -> None:
    """OLMo's have none."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.OlmoConfig(**sizes, num_attention_heads=4, vocab_size=64, eos_token_id=0)
    with torch.device("meta"):
        model = transformers.OlmoForCausalLM(config)
    with pytest.raises(ModelError, match="has no normalisation with weights; use lora or ia3"):
        parts.chosen(dataclasses.replace(tiny.base("llama"), model=model), "norm")


def test_an_architecture_that_ia3_does_not_know_is_refused() -> None:
    own = tiny.base("llama")
    own.model.config.model_type = "novel"
    with pytest.raises(ModelError, match="novel model is not known; name them"):
        DenseModel(own, "ia3")
    assert len(DenseModel(own, "ia3", ["k_proj", "down_proj"]).init(SPEC, 0)) == 2


def test_a_quantised_base_is_refused() -> None:
    own = tiny.base("gpt2")
    layer = own.model.transformer.h[0].mlp.c_fc
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"parameters=full needs .* not quantised: see \S+c_fc"):
        DenseModel(own, "full")


# Training


@pytest.mark.parametrize(("kind", "role"), CASES)
def test_gradients_are_those_of_transformers_and_peft(kind: str, role: KindName) -> None:
    """One step of SGD at rate 1 is the gradient."""
    model = dense(kind, role)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    start, batch = moved(model), batch_of("llama" if kind == "untied" else kind)
    config = tiny.config(
        "fedavg", optimizer="sgd", lr=1.0, local_steps=1, batch_size=4, clip_norm=None
    )
    fit = FirstOrder(model, SPEC, batch, config, 0, 1).fit(start)
    found = {name: start[name] - fit.params[name] for name in start}
    wanted = oracle_gradients(kind, role, start, batch)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-3
    assert apart(found, wanted) < 2e-6


@pytest.mark.parametrize(("kind", "role"), [case for case in CASES if case[1] in ("ia3", "prompt")])
def test_training_is_that_of_plain_peft(kind: str, role: KindName) -> None:
    """Several steps of AdamW on the same batch, on two implementations."""
    model = dense(kind, role)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    start, batch = moved(model), batch_of(kind)
    config = tiny.config("fedavg", lr=1e-2, local_steps=5, batch_size=4, clip_norm=None)
    found = FirstOrder(model, SPEC, batch, config, 0, 1).fit(start).params
    oracle = plain_peft(kind, role, start)
    leaves = peft_tensors(oracle)
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        oracle(**padded(batch)).loss.backward()
        optimizer.step()
    trained = {name: leaf.detach() for name, leaf in leaves.items()}
    assert apart(trained, start) > 0.03
    # Adam divides by |g|: where a gradient is as small as rounding, so are no two results alike.
    off = sum(float((found[n] - t).square().sum()) for n, t in trained.items())
    way = sum(float((start[n] - t).square().sum()) for n, t in trained.items())
    assert off < 1e-6 * way


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_virtual_tokens_are_no_targets(kind: str) -> None:
    """The loss with a prompt is transformers' own on the same embeddings, made by hand."""
    model = dense(kind, "prompt")
    params = moved(model)
    model.write(params, SPEC)
    batch = padded(batch_of(kind))
    plain = base(kind).model
    words = plain.get_input_embeddings()(batch["input_ids"])
    rows = len(words)
    with torch.no_grad():
        found = scoring.loss_sum(model.model, batch)
        wanted = plain(
            inputs_embeds=torch.cat([params["prompt.weight"].expand(rows, -1, -1), words], 1),
            attention_mask=torch.cat(
                [torch.ones(rows, TOKENS, dtype=torch.long), batch["attention_mask"]], 1
            ),
            labels=torch.cat([torch.full((rows, TOKENS), -100), batch["labels"]], 1),
        ).loss
    targets = int((batch["labels"][:, 1:] != -100).sum())
    assert float(found) / targets == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_with_a_prompt_are_greedy(kind: str) -> None:
    model = dense(kind, "prompt")
    noise = torch.randn(TOKENS, 32, generator=seeds.generator(2, "loud"))
    model.write({"prompt.weight": noise}, SPEC)
    wanted = torch.tensor([[5, 9, 3]])
    found = model.model.generate(
        input_ids=wanted,
        attention_mask=torch.ones_like(wanted),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    with torch.no_grad():
        for _ in range(8):
            last = model.model(input_ids=wanted).logits[:, -1:]
            wanted = torch.cat([wanted, last.argmax(-1)], 1)
    assert torch.equal(found, wanted)


# One model serves many clients


@pytest.mark.parametrize(("kind", "role"), CASES)
def test_nothing_else_moves_and_nothing_survives(kind: str, role: KindName) -> None:
    model = dense(kind, role)
    before = untrained(model)
    config = tiny.config("fedavg", lr=0.1, local_steps=3)
    start = moved(model)
    batch = batch_of("llama" if kind == "untied" else kind, 6)
    one = FirstOrder(model, SPEC, batch[:3], config, 1, 1).fit(start).params
    assert same(untrained(model), before)
    assert all(not torch.equal(one[name], start[name]) for name in one)
    FirstOrder(model, SPEC, batch[3:], config, 2, 1).fit(moved(model, 5))
    for buffer in model.model.buffers():
        if buffer.is_floating_point():
            buffer += 1.0  # as a model with running statistics would
    again = FirstOrder(model, SPEC, batch[:3], config, 1, 1).fit(start).params
    assert same(again, one)
    assert same(untrained(model), before)
    assert not any(p.requires_grad or p.grad is not None for _, p in model.parameters())


def test_a_client_that_diverges_leaves_the_model_usable() -> None:
    model = dense("gpt2", "bias")
    start, config = moved(model), tiny.config("fedavg")
    batch = batch_of("gpt2")
    wanted = FirstOrder(model, SPEC, batch, config, 1, 1).fit(start).params
    poisoned = {name: torch.full_like(tensor, torch.nan) for name, tensor in start.items()}
    with pytest.raises(DivergedError):
        FirstOrder(model, SPEC, batch, config, 1, 1).fit(poisoned)
    assert same(FirstOrder(model, SPEC, batch, config, 1, 1).fit(start).params, wanted)


def test_what_does_not_fit_is_refused_and_nothing_is_written() -> None:
    model = dense("gpt2", "bias")
    params = moved(model)
    model.write(params, SPEC)
    name = sorted(params)[-1]
    wrong: list[Params] = [
        {n: t for n, t in moved(model, 2).items() if n != name},
        {**moved(model, 2), "other": torch.zeros(1)},
        {**moved(model, 2), name: torch.zeros(1)},
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match=r"other|" + name):
            model.write(bad, SPEC)
        assert same(model.read(), params)
    with pytest.raises(ValueError, match="frozen low-rank blocks"):
        model.show(Adapter(params, frozen=({},)), SPEC)


# Rounds


class Devices(Network):
    """Clients in this process, in order or in reverse; remembers what they trained."""

    def __init__(self, worker: Worker, reverse: bool) -> None:
        self.worker, self.reverse = worker, reverse
        self.trained: dict[str, Params] = {}
        self.examples: dict[str, int] = {}
        self.sent: dict[str, Payload] = {}

    def clients(self) -> Mapping[str, int]:
        return dict(tiny.CLIENTS)

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client in sorted(packets, reverse=self.reverse):
            answer = self.worker(client, packets[client])
            reply = unpack_reply(answer, 1 << 30)
            assert not reply.error
            self.trained[client] = self.worker.model.read()
            self.examples[client] = reply.num_examples
            self.sent[client] = messages.content(reply)
            yield client, answer


def round_of(
    config: RunConfig, kind: str, folder: Path, reverse: bool = False
) -> tuple[Devices, RoundResult, Payload]:
    """One round of all four clients: (network, result, state before)."""
    own = tiny.base(kind)
    model = trainable.build(config, own)
    network = Devices(Worker(config, model, tiny.data(kind), Memory(folder)), reverse)
    strategy = build_strategy(config)
    state = strategy.init(model.init(SPEC, 0), 0)
    fresh = cache(lambda spec: model.init(spec, 0))
    federation = Federation("0" * 32, config, strategy, tiny.CLIENTS, fresh)
    return network, run_round(RoundCall(federation, state, {}, 1), network), state


ROUNDS: list[tuple[str, KindName, str]] = [
    ("llama", "ia3", "fedavg"),
    ("llama", "prompt", "fedavg"),
    ("gpt2", "bias", "fedavg"),
    ("bert", "head", "fedavg"),
    ("llama", "norm", "fedavg"),
    ("bert", "bias", "fedavg"),
    ("llama", "full", "fedavg"),
    ("llama", "embeddings", "fedavg"),
    ("gpt2", "bias", "fedmezo"),
    ("bert", "ia3", "fedmezo"),
]


@pytest.mark.parametrize(("kind", "role", "strategy"), ROUNDS)
def test_a_round_is_the_mean_in_as_many_bytes_as_the_role_has(
    kind: str, role: KindName, strategy: str, tmp_path: Path
) -> None:
    config = tiny.config(strategy, parameters=role, virtual_tokens=TOKENS, cohort=4)
    network, result, before = round_of(config, kind, tmp_path / "a")
    assert result.traffic.up == result.traffic.down == 4 * 4 * SIZES[kind, role]
    assert (result.cost.up, result.cost.down) == (result.traffic.up, result.traffic.down)
    total = sum(network.examples.values())
    for name, tensor in result.state["adapter"].items():
        mean = sum(
            network.examples[c] / total * network.trained[c][name].double() for c in network.trained
        )
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
    moved = {
        n for n, t in result.state["adapter"].items() if not torch.equal(t, before["adapter"][n])
    }
    assert moved == before["adapter"].keys()


@pytest.mark.parametrize(("kind", "role", "strategy"), ROUNDS)
def test_the_order_of_clients_changes_no_bit(
    kind: str, role: KindName, strategy: str, tmp_path: Path
) -> None:
    config = tiny.config(strategy, parameters=role, virtual_tokens=TOKENS, cohort=4)
    network, result, _ = round_of(config, kind, tmp_path / "a")
    turned, again, _ = round_of(config, kind, tmp_path / "b", reverse=True)
    assert list(network.sent) == list(reversed(turned.sent))
    for client in network.sent:
        assert same(network.sent[client]["adapter"], turned.sent[client]["adapter"])
    assert same(result.state["adapter"], again.state["adapter"])


# Moves along directions


@pytest.mark.parametrize(("kind", "role"), CASES)
def test_moves_go_along_one_vector_of_all_trained_tensors(kind: str, role: KindName) -> None:
    model = dense(kind, role)
    start = moved(model)
    space = model.enter(start, SPEC, ())
    flat = torch.cat([start[name].reshape(-1) for name in sorted(start)])
    z = torch.zeros(len(flat))
    POOL.add(z, 0, [(3, 1.0)])

    def shown() -> Tensor:
        own = model.read()
        return torch.cat([own[name].reshape(-1) for name in sorted(own)])

    space.look(POOL, {3: 0.5})
    assert torch.equal(shown(), flat + 0.5 * z)
    space.look(POOL, {})
    assert torch.equal(shown(), flat)
    space.move(POOL, {3: -0.25})
    space.look(POOL, {})
    assert torch.equal(shown(), flat - 0.25 * z)
    scalars = torch.zeros(64)
    scalars[3] = 2.0
    model.show(Adapter(start, moves=(Move(POOL, scalars, 0.5),)), SPEC)
    torch.testing.assert_close(shown(), flat + z, rtol=0, atol=1e-6)
    model.show(Adapter(start), SPEC)
    assert torch.equal(shown(), flat)


def test_all_parameters_are_moved_in_place_by_those_that_replay(settings: Settings) -> None:
    for strategy, wanted in (("seed_pool", FullModel), ("fedmezo", DenseModel)):
        config = settings(strategy=strategy, parameters="full")
        assert isinstance(trainable.build(config, pretrained.load(config)), wanted)


# Files


@pytest.mark.parametrize(("kind", "role"), CASES)
def test_a_saved_model_reloaded_by_others_gives_the_same_logits(
    kind: str, role: KindName, tmp_path: Path
) -> None:
    model = dense(kind, role)
    params, adapter = moved(model), tmp_path / model.artefact
    model.save(adapter, Adapter(params), SPEC)
    assert [path.name for path in tmp_path.iterdir()] == [model.artefact]
    assert same(model.read(), params)
    wanted = tiny.logits(model.model)
    assert model.distance_to(adapter, SPEC) == 0.0
    assert len(model.digest(adapter)) == 64
    if model.artefact == "adapter":
        with adapter_files.peft_speaks_to_transformers():
            other: Any = PeftModel.from_pretrained(base(kind).model, str(adapter)).eval()
    else:
        other = type(base(kind).model).from_pretrained(adapter)
        stored = load_file(adapter / "model.safetensors")
        assert all(torch.equal(stored[name], params[name]) for name in params)
    torch.testing.assert_close(tiny.logits(other), wanted, rtol=0, atol=1e-6)
    model.write({n: t + 0.1 for n, t in params.items()}, SPEC)
    assert model.distance_to(adapter, SPEC) > 1e-3


@pytest.mark.parametrize("role", ["ia3", "prompt", "embeddings", "full"])
def test_a_base_in_half_precision_is_trained_in_fp32(
    role: KindName, settings: Settings, tmp_path: Path
) -> None:
    config = settings(dtype="bfloat16", parameters=role, virtual_tokens=TOKENS)
    model: Any = trainable.build(config, pretrained.load(config))
    check_half(model, pretrained.load(config), tmp_path)


@pytest.mark.parametrize("role", ["bias", "norm", "head", "ia3", "full"])
def test_a_classifier_in_half_precision_is_trained_in_fp32(role: KindName, tmp_path: Path) -> None:
    own, other = tiny.base("bert"), tiny.base("bert")
    own.model.bfloat16()
    other.model.bfloat16()
    check_half(DenseModel(own, role), other, tmp_path)


def check_half(model: DenseModel, plain: Base, folder: Path) -> None:
    """Steps far below the spacing of bf16 are kept; what is saved is what is shown, rounded."""
    fresh = model.init(SPEC, 0)
    step = {n: t + 1e-6 for n, t in fresh.items()}
    model.write(step, SPEC)
    assert same(model.read(), step)
    small = any(not torch.equal(step[n].bfloat16().float(), step[n]) for n in step)
    assert small
    batch = batch_of("bert" if plain.task == "classify" else "llama")
    config = tiny.config("fedavg", lr=1e-2, local_steps=2)
    trained = FirstOrder(model, SPEC, batch, config, 0, 1).fit(fresh).params
    assert all(t.dtype == torch.float32 for t in trained.values())
    assert apart(trained, fresh) > 1e-3
    place = folder / model.artefact
    model.save(place, Adapter(trained), SPEC)
    wanted = tiny.logits(model.model)
    assert wanted.dtype == torch.bfloat16
    assert model.distance_to(place, SPEC) == 0.0
    if model.artefact == "model":
        stored = load_file(place / "model.safetensors")
        assert {t.dtype for t in stored.values()} == {torch.bfloat16}
        assert stored.keys() == dict(plain.model.named_parameters()).keys()  # tied ones once
        assert all(torch.equal(stored[n], t.bfloat16()) for n, t in trained.items())
        assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
        assert torch.equal(tiny.logits(type(plain.model).from_pretrained(place)), wanted)
    else:
        assert torch.equal(tiny.logits(adapter_files.load_adapter(plain.model, place)), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_scales_are_merged_by_peft(kind: str, tmp_path: Path) -> None:
    """Conv1D keeps its weight the other way round; a scale of outputs is one of the bias too."""
    model = dense(kind, "ia3")
    params = moved(model)
    model.save(tmp_path / "adapter", Adapter(params), SPEC)
    wanted = tiny.logits(model.model)
    merged = adapter_files.merge(adapter_files.load_adapter(base(kind).model, tmp_path / "adapter"))
    torch.testing.assert_close(tiny.logits(merged), wanted, rtol=0, atol=1e-5)


# Runs


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    from tests.conftest import byte_tokenizer

    config = transformers.GPT2Config(
        vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=128, bos_token_id=0,
        eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(3)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def run(*options: str | Path) -> Any:
    return CliRunner().invoke(app, [str(option) for option in options])


@pytest.mark.parametrize(
    ("role", "strategy", "folder"),
    [
        ("ia3", "fedavg", "adapter"),
        ("prompt", "fedavg", "adapter"),
        ("bias", "fedavg", "model"),
        ("full", "fedavg", "model"),
        ("ia3", "seed_pool", "adapter"),
        ("prompt", "fedkseed", "adapter"),
        ("bias", "seed_pool", "model"),
    ],
)
def test_a_run_ends_in_an_artefact_that_is_evaluated(
    role: str,
    strategy: str,
    folder: str,
    gpt2_folder: Path,
    federation_file: Path,
    tmp_path: Path,
    settings: Settings,
) -> None:
    out = tmp_path / "run"
    small = ["--rounds", "2", "--local-steps", "2", "--lr", "0.01", "--set", "virtual-tokens=3"]
    small += ["--set", "threads=1", "--set", "eval-examples=8", "--set", "max-length=48"]
    chosen = ["--strategy", strategy, "--set", f"parameters={role}", *small]
    result = run(
        "simulate", "--model", gpt2_folder, "--data", federation_file, "--out", out, *chosen
    )
    assert result.exit_code == 0, result.output
    info = json.loads((out / "run.json").read_text())
    assert info["status"] == "done"
    assert info["aggregates"] == "weights" or strategy != "fedavg"
    scores = artefacts.evaluate_adapter(out / folder, None, None)
    assert scores[folder]["loss"] == pytest.approx(info["final"]["loss"], abs=1e-5)
    assert scores["base"]["loss"] != scores[folder]["loss"]
    if role == "ia3":
        assert export_merged(out / folder, None, tmp_path / "merged") < 1e-4
    if role == "prompt":
        with pytest.raises(ArtefactError, match="a prompt cannot be merged"):
            export_merged(out / folder, None, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_labels_of_a_scaled_classifier_are_counted_without_its_run(tmp_path: Path) -> None:
    model = dense("bert", "ia3")
    model.save(tmp_path / "adapter", Adapter(moved(model)), SPEC)
    head = adapter_files.head_of(tmp_path / "adapter")
    assert {n: tuple(t.shape) for n, t in head.items()} == {
        "classifier.weight": (3, 32),
        "classifier.bias": (3,),
    }
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(ArtefactError, match="is no adapter"):
        adapter_files.head_of(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--set", "parameters=bias"], 1, "has no bias vectors; use lora, ia3 or prompt"),
        (["--set", "parameters=head"], 1, "is tied to its input embeddings"),
        (["--set", "parameters=bias", "--set", "quantization=8bit"], 2, "a base in 8bit"),
        (["--set", "parameters=full", "--set", "quantization=4bit"], 2, "a base in 4bit"),
        (["--set", "parameters=ia3", "--strategy", "flora"], 2, "flora trains LoRA factors"),
        (["--set", "parameters=ia3", "--set", 'target_modules=["x"]'], 1, "x match nothing"),
        (["--set", "parameters=full", "--keep-updates"], 2, "parameters=full has none"),
        (
            ["--set", "parameters=prompt", "--set", "virtual_tokens=100"],
            1,
            "max_length 48 after 100 virtual_tokens is more than the 128 positions",
        ),
    ],
)
def test_mistakes_get_one_line(
    options: list[str],
    code: int,
    says: str,
    tiny_model: Path,
    federation_file: Path,
    tmp_path: Path,
) -> None:
    common = ["--model", str(tiny_model), "--data", str(federation_file), "--set", "max-length=48"]
    result = run("simulate", *common, *options, "--out", tmp_path / "run")
    assert result.exit_code == code
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert says in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_prompt_on_a_classifier_gets_one_line(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": "ab"[i % 2], "client_id": str(i % 2)} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--set", "max-length=48", "--set", "parameters=prompt", "--data"]
    options += [str(tmp_path / "data.jsonl"), "--model", str(tiny_model)]
    result = run("simulate", *options, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "is a classifier" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
