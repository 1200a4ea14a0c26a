from pathlib import Path

import pytest
import torch
from peft import PeftModel

from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.round import evaluate_clients
from corolla.strategies.feddpa import FedDpa
from corolla.tensors import tree
from corolla.types import Cost, LoraSpec, Params, Size
from tests.strategies import tiny

SPEC = LoraSpec(2, 6.0)
HEAD: Params = {"bias": torch.tensor([1.0])}


def test_the_local_adapter_is_trained_beside_the_global_one_then_the_global_one() -> None:
    """W + (1 - a) s B_g A_g frozen, + a s B_l A_l trained; the head only with the global one."""
    shared = {**tiny.pair(2, 0), **HEAD}
    fresh = {**tiny.pair(2, 1), **HEAD}
    ends = {**tiny.pair(2, 2), "bias": torch.tensor([5.0])}
    client = tiny.Scripted(ends, 3, SPEC, fresh=fresh)
    (update,) = tiny.scripted(FedDpa(share=0.25), {"adapter": shared}, [client])
    local, whole = client.asked
    assert local["strength"] == 0.25
    assert tiny.same(local["start"], fresh)
    (beside,) = local["frozen"]
    off = tiny.dense(beside) - 0.75 * SPEC.scaling * tiny.dense(shared)
    assert float(off.norm()) < 1e-5
    assert not local["train"]("bias")
    assert (whole["strength"], whole["frozen"]) == (1.0, ())
    assert tiny.same(whole["start"], shared)
    assert tiny.same(update.keep["personal"], tiny.pair(2, 2))
    assert tiny.same(update.payload["adapter"], tree.sub(ends, shared))


def test_who_comes_back_goes_on_from_its_own_adapter() -> None:
    shared = tiny.pair(2, 0)
    kept = {"personal": tiny.pair(2, 7)}
    client = tiny.Scripted(tiny.pair(2, 2), 3, SPEC, fresh=tiny.pair(2, 1), kept=kept)
    tiny.scripted(FedDpa(), {"adapter": shared}, [client])
    assert tiny.same(client.asked[0]["start"], tiny.pair(2, 7))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_global_model_is_fedavgs_bit_for_bit(share: float, tmp_path: Path) -> None:
    """With any share: what stays on the devices never pulls at what travels."""
    states = []
    for name, options in (("feddpa", {"share": share}), ("fedavg", {})):
        run = tiny.start(tiny.config(name, options=options), "bert", tmp_path / name)
        run.step()
        run.step()
        states.append(tree.digest_all(run.state))
    assert states[0] == states[1]


@pytest.mark.parametrize("model", tiny.KINDS)
def test_a_clients_model_is_the_weighted_sum_of_both_adapters(model: str, tmp_path: Path) -> None:
    """By peft, from the folder that it has saved; both products dense in fp64."""
    share = 0.25
    settings = tiny.config("feddpa", cohort=4, options={"share": share})
    run = tiny.start(settings, model, tmp_path)
    run.step()
    run.step()
    scores = evaluate_clients(RoundCall(run.federation, run.state, run.held, 3), run.network)
    for client in tiny.CLIENTS:
        memory = run.network.worker.memory
        own, scaling = memory.kept(client, 2)["personal"], settings.lora.scaling
        folder = memory.kept_folder(client) / "adapter"
        loaded = PeftModel.from_pretrained(tiny.base(model).model, str(folder))
        found, wanted = tiny.peft_weights(loaded), {}
        for name in [n.removesuffix(".lora_A") for n in own if n.endswith(".lora_A")]:
            both = (1 - share) * tiny.dense(run.state["adapter"], name)
            both = scaling * (both + share * tiny.dense(own, name))
            wanted[name] = both.T if model == "gpt2" else both
        assert tiny.relative(found, wanted) < 1e-6
        assert {n for n in found if n not in wanted} == (
            {"classifier.weight", "classifier.bias"} if model == "bert" else set()
        )
        assert scores[client]["loss"] > 0


def test_without_a_share_nothing_is_trained_or_kept_beside() -> None:
    client = tiny.Scripted(tiny.pair(2, 2), 3, SPEC)
    (update,) = tiny.scripted(FedDpa(share=0.0), {"adapter": tiny.pair(2, 0)}, [client])
    assert len(client.asked) == 1
    assert update.keep == {}


def test_costs_what_fedavg_costs() -> None:
    assert FedDpa().cost([Size(A=3, B=5, head=2)]) == [Cost(up=40, down=40)]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_makes_no_sense_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must be from 0 to below 1"):
        FedDpa(share)
