import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from corolla.client.training.worker import encode_all
from corolla.data.encoding import Encoder
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.round import evaluate_clients
from corolla.strategies.fedsa_lora import FedSaLora
from corolla.types import Cost, Params, Payload, Size
from corolla.wire import messages
from tests.strategies import tiny

START: Params = {"m.lora_A": torch.tensor([[1.0, 2.0]]), "m.lora_B": torch.zeros(2, 1)}
FRESH: Params = {"m.lora_A": torch.ones(1, 2), "m.lora_B": torch.zeros(2, 1), "bias": torch.ones(1)}


def ending(a: list[float], b: list[float], n: int) -> tiny.Scripted:
    ends = {"m.lora_A": torch.tensor([a]), "m.lora_B": torch.tensor([b]).T}
    return tiny.Scripted({**ends, "bias": torch.tensor([b[0]])}, n, fresh=FRESH)


def test_a_is_averaged_and_b_and_the_head_stay() -> None:
    """(1·(4, 0) + 3·(8, 4)) / 4."""
    state = FedSaLora().init({**START, "bias": torch.zeros(1)}, 0)
    clients = [ending([4.0, 0.0], [1.0, 2.0], 1), ending([8.0, 4.0], [3.0, 4.0], 3)]
    for update, own in zip(tiny.scripted(FedSaLora(), state, clients), clients, strict=True):
        assert update.payload.keys() == {"adapter"}
        assert update.payload["adapter"].keys() == {"m.lora_A"}
        kept = {name: own.outcome[name] for name in ("m.lora_B", "bias")}
        assert tiny.same(update.keep["personal"], kept)
    after = tiny.play(FedSaLora(), state, clients)
    assert {name: t.tolist() for name, t in after["adapter"].items()} == {"m.lora_A": [[7.0, 3.0]]}
    assert FedSaLora().aggregator().linear


def test_a_newcomer_starts_from_zero_and_who_comes_back_from_its_own() -> None:
    state = FedSaLora().init(START, 0)
    newcomer = ending([4.0, 0.0], [1.0, 2.0], 1)
    (update,) = tiny.scripted(FedSaLora(), state, [newcomer])
    wanted = {**FRESH, "m.lora_A": START["m.lora_A"]}
    assert tiny.same(newcomer.asked[0]["start"], wanted)
    back = replace(newcomer, kept=update.keep, asked=[])
    tiny.scripted(FedSaLora(), state, [back])
    assert tiny.same(back.asked[0]["start"], {**newcomer.outcome, "m.lora_A": START["m.lora_A"]})


def test_bytes_are_those_of_a() -> None:
    assert FedSaLora().cost([Size(A=3, B=5, head=2)]) == [Cost(up=12, down=12)]


@pytest.fixture
def run(tmp_path: Path) -> tiny.Run:
    """After three rounds in which every client took part."""
    run = tiny.start(tiny.config("fedsa_lora", cohort=4), "llama", tmp_path / "memory")
    for _ in range(3):
        run.step()
    return run


def test_no_b_is_ever_sent(run: tiny.Run) -> None:
    """By name, and by the bytes of what each client trained."""
    for client, packet in run.network.sent.items():
        sent = run.network.update(client)
        assert all(name.endswith(".lora_A") for params in sent.values() for name in params)
        assert messages.content_bytes(sent) == 4 * 4 * (6 * 32 + 48)
        whole = packet.header + packet.payload
        trained = run.network.trained[client]
        b = [tensor for name, tensor in trained.items() if name.endswith(".lora_B")]
        assert all(bool(tensor.any()) for tensor in b)
        assert not any(tensor.numpy().tobytes() in whole for tensor in b)


def test_clients_evaluate_their_own_model_and_save_it_for_plain_peft(run: tiny.Run) -> None:
    """Its loss by transformers alone, from the folder on the device."""
    scores = evaluate_clients(RoundCall(run.federation, run.state, run.held, 4), run.network)
    data, losses = tiny.data("llama"), set()
    for client in tiny.CLIENTS:
        folder = run.network.worker.memory.kept_folder(client) / "adapter"
        model = PeftModel.from_pretrained(tiny.base("llama").model, str(folder)).eval()
        encoder = Encoder(run.model.base.tokenizer, [], run.federation.config.max_length)
        sequences, _ = encode_all(encoder, data.clients[client].eval)
        total, targets = 0.0, 0
        for own in sequences:
            ids = torch.tensor([list(own.input_ids)])
            with torch.no_grad():
                loss = model(input_ids=ids, labels=ids).loss
            total, targets = total + float(loss) * (ids.numel() - 1), targets + ids.numel() - 1
        assert scores[client]["loss"] == pytest.approx(total / targets, rel=1e-5)
        losses.add(scores[client]["loss"])
        assert math.isfinite(total)
    assert len(losses) == len(tiny.CLIENTS)


def test_the_personal_model_is_the_shared_a_with_ones_own_b(run: tiny.Run) -> None:
    state: Payload = run.state
    for client in tiny.CLIENTS:
        kept = run.network.worker.memory.kept(client, 3)
        found = FedSaLora().adapter({**state, **kept}).trained
        for name, tensor in run.network.trained[client].items():
            own = state["adapter"] if name.endswith(".lora_A") else {name: tensor}
            assert torch.equal(found[name], own[name])
