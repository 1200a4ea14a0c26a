"""Compressed updates and broadcasts in whole rounds: what is sent, what stays on the device."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corolla.config import load as config
from corolla.errors import ConfigError
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, evaluate_clients, run_round
from corolla.tensors import factors, tree
from corolla.types import Params, Payload
from corolla.wire import codec, messages
from corolla.wire.compression import PLAIN, pipeline
from corolla.wire.packet import Packet
from tests.strategies import devices, tiny

SHARES = {client: n / sum(tiny.CLIENTS.values()) for client, n in tiny.CLIENTS.items()}
"""p_m, where every example is trained on."""


@dataclass
class Lossy(Network):
    """A network that loses the answers of some clients."""

    network: devices.Devices
    lost: set[str] = field(default_factory=set)

    def clients(self) -> Mapping[str, int]:
        return self.network.clients()

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client, packet in self.network.ask(packets):
            yield client, None if client in self.lost else packet


def started(tmp_path: Path, kind: str = "llama", **changes: Any) -> devices.Run:
    return devices.start(kind, tmp_path, **{"strategy": "fedavg", "local_epochs": 1, **changes})


def step(run: devices.Run, *lost: str) -> RoundResult:
    """A round of all clients, some of whose answers are lost."""
    run.round += 1
    federation = replace(
        run.federation, config=run.federation.config.model_copy(update={"cohort": 4})
    )
    network = Lossy(run.network, set(lost))
    result = run_round(RoundCall(federation, run.state, run.held, run.round), network)
    assert set(result.dropped) == set(lost)
    run.state, run.held = result.state, result.held
    return result


def like(run: devices.Run, client: str = "a") -> Payload:
    federation = run.federation
    fresh = federation.fresh(federation.lora(client))
    return federation.strategy.update_like(fresh, federation.size(client, run.round))


def decoded(run: devices.Run, client: str) -> Payload:
    """What a client has sent in the last round, decoded."""
    form = like(run, client)
    return run.federation.config.uplink.unpack(messages.content(run.network.replies[client]), form)


def vector(params: Params) -> Tensor:
    return torch.cat([params[name].reshape(-1) for name in sorted(params)])


def residual(run: devices.Run, client: str) -> Tensor:
    """What a device has staged after its last round."""
    kept, _ = codec.read(str(run.network.folder / client / "kept" / client / "staged.safetensors"))
    return vector({name.partition("/")[2]: tensor for name, tensor in kept.items()})


def size_of(run: devices.Run) -> int:
    return sum(t.numel() for p in like(run).values() for t in p.values())


# ------------------------------------------------------------------ updates


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_aggregate_is_the_mean_of_what_was_decoded(kind: str, tmp_path: Path) -> None:
    run = started(tmp_path, kind, codec=["top_k:0.1", "int8"])
    before = run.state["adapter"]
    result = step(run)
    p, tensors = size_of(run), len(like(run)["adapter"])
    k = math.floor(0.1 * p)
    assert result.traffic.up == result.cost.up == 4 * (k + math.ceil(p / 8) + 4 * tensors)
    assert not result.cost.at_most
    updates = {client: decoded(run, client)["adapter"] for client in tiny.CLIENTS}
    assert {int(vector(u).count_nonzero()) <= k for u in updates.values()} == {True}
    for name, tensor in run.state["adapter"].items():
        mean = sum(SHARES[c] * u[name].double() for c, u in updates.items())
        torch.testing.assert_close(tensor.double(), before[name].double() + mean, rtol=0, atol=1e-8)


def test_zstd_sends_at_most_what_the_formula_says(tmp_path: Path) -> None:
    run = started(tmp_path, codec=["top_k:0.1", "int8", "zstd"])
    result = step(run)
    frames = [messages.content(reply)[""] for reply in run.network.replies.values()]
    assert result.traffic.up == sum(t.numel() for box in frames for t in box.values())
    assert result.traffic.up < result.cost.up
    assert result.cost.at_most
    sent = result.traffic.up + result.traffic.framing_up
    assert sent == sum(
        len(messages.pack_reply(r).header) + len(r.payload) for r in run.network.replies.values()
    )


def test_compressed_training_still_learns(tmp_path: Path) -> None:
    gains = []
    for steps in ([], ["top_k:0.25", "int8", "zstd"], ["int4"]):
        run = started(tmp_path / str(len(steps)), codec=steps, lr=0.02, local_epochs=2, rounds=8)
        losses = [step(run).metrics["train_loss"] for _ in range(8)]
        gains.append(losses[0] - losses[-1])
    assert gains[0] > 0.08
    assert all(gain > 0.8 * gains[0] for gain in gains)


def test_what_is_left_out_stays_on_the_device_and_is_sent_later(tmp_path: Path) -> None:
    """Update + old residual = decoded + new residual, bit for bit; weights were read from torch."""
    run = started(tmp_path, codec=["top_k:0.05"])
    owed = dict.fromkeys(tiny.CLIENTS, torch.zeros(1))
    for _ in range(3):
        start = run.state["adapter"]
        step(run)
        for client in tiny.CLIENTS:
            update = vector(tree.sub(run.network.weights[client], start))
            sent = vector(decoded(run, client)["adapter"])
            assert torch.equal(sent + residual(run, client), update + owed[client])
            owed[client] = residual(run, client)
            assert float(owed[client].norm()) > float(sent.norm()) / 10
    assert not any(
        "owed" in group
        for reply in run.network.replies.values()
        for group in messages.content(reply)
    )


def test_a_rejected_update_leaves_the_residual_as_it_was(tmp_path: Path) -> None:
    run = started(tmp_path, codec=["top_k:0.05"])
    owed = torch.zeros(1)
    for lost in (True, False, True, False):
        start = run.state["adapter"]
        step(run, *["a"][:lost])
        update = vector(tree.sub(run.network.weights["a"], start))
        sent = vector(decoded(run, "a")["adapter"])
        assert torch.equal(sent + residual(run, "a"), update + owed)
        if not lost:
            owed = residual(run, "a")


def test_a_device_that_lost_its_residual_goes_on(tmp_path: Path) -> None:
    run = started(tmp_path, codec=["top_k:0.05"])
    step(run)
    (tmp_path / "a" / "kept" / "a" / "staged.safetensors").unlink()
    start = run.state["adapter"]
    step(run)
    update = vector(tree.sub(run.network.weights["a"], start))
    assert torch.equal(vector(decoded(run, "a")["adapter"]) + residual(run, "a"), update)


def test_scaffold_keeps_its_own_beside_the_residual(tmp_path: Path) -> None:
    plain = started(tmp_path / "plain", strategy="scaffold", optimizer="sgd")
    same = started(
        tmp_path / "same", strategy="scaffold", optimizer="sgd", codec=["top_k:1", "zstd"]
    )
    for _ in range(3):
        step(plain), step(same)
    assert tree.digest_all(plain.state) == tree.digest_all(same.state)
    sparse = started(tmp_path / "sparse", strategy="scaffold", optimizer="sgd", codec=["top_k:0.1"])
    for _ in range(3):
        result = step(sparse)
    assert result.traffic.up == result.cost.up
    assert tree.digest_all(sparse.state) != tree.digest_all(plain.state)


@pytest.mark.parametrize("strategy", ["flora", "ffa_lora", "fedmezo"])
@pytest.mark.parametrize("steps", [["fp16"], ["int8"], ["bf16", "zstd"]])
def test_number_types_fit_every_dense_strategy(
    strategy: str, steps: list[str], tmp_path: Path
) -> None:
    changes: dict[str, Any] = (
        {"local_epochs": None, "local_steps": 2} if strategy == "fedmezo" else {}
    )
    run = started(tmp_path, strategy=strategy, codec=steps, **changes)
    result = step(run)
    assert (
        result.traffic.up <= result.cost.up
        if "zstd" in steps
        else result.traffic.up == result.cost.up
    )
    plain = PLAIN.content_bytes(like(run))[0] * 4
    assert result.cost.up == pytest.approx(plain / (4 if steps == ["int8"] else 2), rel=0.1)


def test_flora_at_rank_1_stacks_the_best_of_each_client(tmp_path: Path) -> None:
    """Against dense SVDs of what each client's model held."""
    run = started(tmp_path, strategy="flora", ranks=[4, 2, 4, 4], codec=["rank:1"])
    result = step(run)
    assert result.traffic.up == result.cost.up
    (block,) = (params for group, params in run.state.items() if group.startswith("block"))
    for module in factors.modules(block):
        expected = torch.zeros(())
        for client, share in SHARES.items():
            held, scaling = run.network.weights[client], run.federation.lora(client).scaling
            u, s, vt = torch.linalg.svd(scaling * factors.product(held, module))
            expected = expected + share * s[0] * torch.outer(u[:, 0], vt[0])
        found = factors.product(block, module)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.norm()))


def test_scalars_beside_dense_updates_are_left_alone(tmp_path: Path) -> None:
    classes = {"strong": {"trainer": "first_order"}, "weak": {"trainer": "zeroth_order"}}
    changes: dict[str, Any] = {
        "strategy": "mixed",
        "classes": classes,
        "local_epochs": None,
        "local_steps": 3,
    }
    plain = started(tmp_path / "plain", **changes)
    run = started(tmp_path / "run", codec=["top_k:0.1", "int8"], codec_down=["bf16"], **changes)
    before, after = step(plain), step(run)
    assert before.traffic.up == before.cost.up
    assert after.traffic.up == after.cost.up < before.traffic.up / 2
    assert after.traffic.down == after.cost.down < before.traffic.down * 0.6


def test_hostile_bytes_cost_one_update(tmp_path: Path) -> None:
    run = started(tmp_path, codec=["top_k:0.1", "int8", "zstd"], quorum=0.5)

    @dataclass
    class Hostile(Lossy):
        def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
            for client, _ in self.network.ask(packets):
                reply = self.network.replies[client]
                box = {"content": torch.full((10,), 255, dtype=torch.uint8)}
                bad = {
                    "a": codec.encode({"": box}),
                    "b": b"\0" * (3 << 20),
                    "c": reply.payload,
                    "d": reply.payload,
                }
                yield client, messages.pack_reply(replace(reply, payload=bad[client]))

    before = run.state["adapter"]
    changed = run.federation.config.model_copy(update={"cohort": 4})
    federation = replace(run.federation, config=changed)
    result = run_round(RoundCall(federation, run.state, {}, 1), Hostile(run.network))
    assert result.dropped.keys() == {"a", "b"}
    assert "compressed payload has 10 bytes, expected" in result.dropped["a"]
    assert "at most" in result.dropped["b"]
    assert result.traffic.up < result.cost.up
    run.round = 1
    for name, tensor in result.state["adapter"].items():
        updates = {client: decoded(run, client)["adapter"][name] for client in "cd"}
        mean = (6 * updates["c"].double() + 4 * updates["d"].double()) / 10
        torch.testing.assert_close(tensor.double(), before[name].double() + mean, rtol=0, atol=1e-8)


# ------------------------------------------------------------------ broadcasts


@pytest.mark.parametrize("steps", [["fp16"], ["bf16"], ["int8"], ["int8", "zstd"]])
def test_clients_start_from_what_they_decoded(steps: list[str], tmp_path: Path) -> None:
    run = started(tmp_path, codec_down=steps)
    step(run)
    before = run.state["adapter"]
    result = step(run)
    task = run.network.tasks["a"]
    start = pipeline(steps).unpack(messages.content(task), {"adapter": before})["adapter"]
    error = vector(start) - vector(before)
    assert 0 < float(error.norm()) < 0.02 * float(vector(before).norm())
    for client in tiny.CLIENTS:
        update = tree.sub(run.network.weights[client], start)
        assert torch.equal(vector(decoded(run, client)["adapter"]), vector(update))
    p, tensors = size_of(run), len(before)
    expected = {"fp16": 2 * p, "bf16": 2 * p, "int8": p + 4 * tensors}[steps[0]]
    assert result.cost.down == 4 * expected
    assert (
        result.traffic.down == 4 * expected
        if len(steps) == 1
        else result.traffic.down <= 4 * expected
    )


def test_what_is_cached_stays_whole(tmp_path: Path) -> None:
    run = started(tmp_path, strategy="ffa_lora", codec_down=["bf16"])
    first, second = step(run), step(run)
    assert (
        first.traffic.down
        == first.cost.down + 4 * run.federation.strategy.cost([run.federation.size("a")])[0].once
    )
    assert second.traffic.down == second.cost.down
    for client in tiny.CLIENTS:
        held = run.network.weights[client]
        assert all(torch.equal(held[name], t) for name, t in run.state["A"].items())


def test_lossless_codecs_change_no_bit(tmp_path: Path) -> None:
    plain = started(tmp_path / "plain")
    run = started(tmp_path / "run", codec=["top_k:1", "zstd"], codec_down=["zstd"])
    for _ in range(2):
        step(plain), step(run)
    assert tree.digest_all(plain.state) == tree.digest_all(run.state)


def test_both_ways_have_the_same_bits_in_any_order(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"codec": ["top_k:0.1", "int4", "zstd"], "codec_down": ["int8"]}
    found = set()
    for reverse in (False, True):
        run = started(tmp_path / str(reverse), reverse=reverse, **changes)
        for _ in range(2):
            step(run)
        found.add(tree.digest_all(run.state))
    assert len(found) == 1


def test_a_form_that_lies_is_refused_by_the_client(tmp_path: Path) -> None:
    run = started(tmp_path, codec_down=["int8"])
    packets: dict[str, Packet] = {}

    @dataclass
    class Spy(Lossy):
        def ask(self, asked: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
            packets.update(asked)
            yield from self.network.ask(asked)

    run_round(RoundCall(run.federation, run.state, {}, 1), Spy(run.network))
    task = messages.unpack_task(packets["a"])
    for old, new in (
        ("float32", "float99"),
        ('"adapter": {', '"other": {'),
        ("[", "[1099511627776, "),
    ):
        where = task.config.index('"form"')
        lying = task.config[:where] + task.config[where:].replace(old, new, 3)
        packet = messages.pack_task(replace(task, config=lying))
        answer = messages.unpack_reply(run.network.worker("a")("a", packet), 1 << 30)
        assert answer.error, new
        assert "\n" not in answer.error


# ------------------------------------------------------------------ sparse broadcasts


def masked(params: Params, density: float) -> dict[str, Tensor]:
    """P ∘ m by numpy: the ⌊density · P⌋ largest of all A and of all B, of equal ones the first."""
    kept = {name: np.zeros(tensor.numel(), np.float32) for name, tensor in params.items()}
    for role in (".lora_A", ".lora_B"):
        names = sorted(name for name in params if name.endswith(role))
        flat = [(name, i) for name in names for i in range(params[name].numel())]
        values = np.concatenate([params[name].flatten().numpy() for name in names])
        for place in np.argsort(-np.abs(values), kind="stable")[
            : math.floor(density * len(values))
        ]:
            name, i = flat[place]
            kept[name][i] = values[place]
    heads = {n: t for n, t in params.items() if not n.endswith((".lora_A", ".lora_B"))}
    made = {n: torch.from_numpy(own).reshape(params[n].shape) for n, own in kept.items()}
    return {**made, **heads}


def sparse_bytes(params: Params, density: float) -> int:
    """4 k + min(4 k, ⌈P / 8⌉) of each role, and all of a head."""
    total = 0
    for role in (".lora_A", ".lora_B"):
        p = sum(t.numel() for n, t in params.items() if n.endswith(role))
        k = math.floor(density * p)
        total += 4 * k + min(4 * k, math.ceil(p / 8))
    heads = [t.numel() for n, t in params.items() if not n.endswith((".lora_A", ".lora_B"))]
    return total + 4 * sum(heads)


def started_from(run: devices.Run, before: Params) -> Params:
    """What clients decode of the last round's broadcast of this adapter."""
    content = messages.content(run.network.tasks["a"])
    return run.federation.config.downlink.unpack(content, {"adapter": before})["adapter"]


@pytest.mark.parametrize("density", [0.25, 0.01])
@pytest.mark.parametrize(("kind", "strategy"), [("llama", "fedavg"), ("bert", "fedadam")])
def test_clients_train_densely_from_the_largest_of_each_role(
    kind: str, strategy: str, density: float, tmp_path: Path
) -> None:
    """The start is P ∘ m, and P moves by what the strategy makes of trained - P ∘ m."""
    run = started(tmp_path, kind, strategy=strategy, codec_down=[f"top_k:{density}"])
    for number in range(2):
        before = run.state
        result = step(run)
        assert result.traffic.down == result.cost.down
        assert result.cost.down == 4 * sparse_bytes(before["adapter"], density)
        start, wanted = started_from(run, before["adapter"]), masked(before["adapter"], density)
        assert start.keys() == wanted.keys()
        assert all(torch.equal(start[n], wanted[n]) for n in wanted)
        ends = dict.fromkeys(SHARES, 0)
        for client in ends:
            held = run.network.weights[client]
            update = tree.sub(held, start)
            assert torch.equal(vector(decoded(run, client)["adapter"]), vector(update))
            if number:  # what was 0 is trained as well
                moved = [n for n in start if bool(((start[n] == 0) & (held[n] != 0)).any())]
                assert len(moved) > len(start) // 4
        if strategy == "fedavg":
            for n, tensor in before["adapter"].items():
                changes = [
                    p * (run.network.weights[c][n] - start[n]).double() for c, p in SHARES.items()
                ]
                wanted_after = tensor.double() + torch.stack(changes).sum(0)
                torch.testing.assert_close(
                    run.state["adapter"][n].double(), wanted_after, rtol=0, atol=1e-7
                )


def test_the_first_broadcast_is_of_a_where_b_is_zero(tmp_path: Path) -> None:
    run = started(tmp_path, codec_down=["top_k:0.25"])
    before = run.state["adapter"]
    step(run)
    start = started_from(run, before)
    count = sum(t.numel() for n, t in before.items() if n.endswith(".lora_A"))
    there = {n: int(t.count_nonzero()) for n, t in start.items()}
    assert sum(there.values()) == math.floor(0.25 * count)
    assert not any(number for n, number in there.items() if n.endswith(".lora_B"))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_broadcast_of_all_values_changes_no_bit(kind: str, tmp_path: Path) -> None:
    plain = started(tmp_path / "plain", kind)
    run = started(tmp_path / "run", kind, codec_down=["top_k:1"])
    for _ in range(2):
        assert step(plain).traffic.down == step(run).traffic.down
    assert tree.digest_all(plain.state) == tree.digest_all(run.state)


def test_sparse_both_ways_has_the_same_bits_in_any_order(tmp_path: Path) -> None:
    both: dict[str, Any] = {"codec": ["top_k:0.25"], "codec_down": ["top_k:0.25", "int8", "zstd"]}
    found = set()
    for reverse in (False, True):
        run = started(tmp_path / str(reverse), reverse=reverse, **both)
        for _ in range(2):
            result = step(run)
            assert result.traffic.down <= result.cost.down
        found.add(tree.digest_all(run.state))
    assert len(found) == 1


def test_what_clients_measure_is_the_model_of_the_run(tmp_path: Path) -> None:
    """Not the part of it that training starts from: evaluation travels whole."""
    plain = started(tmp_path / "plain")
    run = started(tmp_path / "run", codec_down=["top_k:0.01"])
    step(plain), step(run)
    plain.state = run.state
    found = [evaluated(own) for own in (plain, run)]
    assert found[0] == found[1]
    start = masked(run.state["adapter"], 0.01)
    plain.state = {"adapter": start}
    assert evaluated(plain) != found[0]


def evaluated(run: devices.Run) -> dict[str, float]:
    call = RoundCall(run.federation, run.state, run.held, run.round)
    return {client: own["loss"] for client, own in evaluate_clients(call, run.network).items()}


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({"strategy": name}, "does not aggregate their changes of it: use fedavg or fedadagrad")
            for name in ("rolora", "ffa_lora", "fed_sb", "fedsa_lora", "mixed", "lora_fair")
        ],
        *[
            ({"strategy": name}, "does not aggregate their changes of it")
            for name in ("flora", "fedex_lora", "flexlora", "hetlora", "feddpa", "fedsvd")
        ],
        ({"strategy": "scaffold", "optimizer": "sgd"}, "does not aggregate their changes of it"),
        ({"strategy": "seed_pool"}, "there is nothing to compress"),
        *[
            ({"parameters": name}, f"neutral in LoRA factors, found parameters={name}")
            for name in ("ia3", "prompt", "bias", "head")
        ],
    ],
)
def test_sparse_broadcasts_are_refused_where_zero_is_not_neutral(
    changes: dict[str, Any], message: str
) -> None:
    classes = {"a": {"trainer": "first_order"}, "b": {"trainer": "zeroth_order"}}
    if changes.get("strategy") == "mixed":
        changes = {**changes, "classes": classes}
    with pytest.raises(ConfigError, match=message) as error:
        config.validate({**changes, "codec_down": ["top_k:0.5"]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": ["topk:1"]}, "did you mean 'top_k'"),
        ({"codec": ["int8", "fp16"]}, "each at most once"),
        ({"codec_down": ["int4"]}, "use top_k of factors, fp16, bf16 or int8, and zstd"),
        ({"codec_down": ["top_k:0.1", "int4"]}, "a broadcast holds weights"),
        ({"codec_down": ["zstd", "top_k:0.1"]}, "the order is rank:R, top_k:DENSITY"),
        ({"codec_down": ["rank:2"]}, "a broadcast holds weights"),
        ({"codec": ["rank:2"]}, "strategy fedavg sends differences: codec rank keeps the products"),
        ({"codec": ["top_k:0.1"], "strategy": "flora"}, "flora sends factors: codec top_k is for"),
    ],
)
def test_a_codec_that_would_change_the_meaning_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config.validate(changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("strategy", ["seed_pool", "fedkseed", "fedkseed_pro", "ferret"])
@pytest.mark.parametrize("key", ["codec", "codec_down"])
def test_scalars_have_nothing_to_compress(strategy: str, key: str) -> None:
    with pytest.raises(ConfigError, match="there is nothing to compress"):
        config.validate({"strategy": strategy, key: ["int8"]})
