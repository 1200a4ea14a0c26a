"""A native device answers the tasks of a server as Python's worker does."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.directions import moving, seedlog, signs
from corolla.directions.pools import SignPool
from corolla.tensors import tree
from corolla.types import Params, Payload
from corolla.wire import codec, messages
from corolla.wire.messages import Reply
from tests.bundles import Exported
from tests.client.native import core_tasks
from tests.client.native.core_tasks import Case, farthest

Make = Callable[..., Case]


@pytest.fixture
def make(tmp_path: Path, native_build: Path, small_bundle: Exported) -> Make:
    def made(**changes: Any) -> Case:
        check = native_build / "corolla-native-check"
        return core_tasks.case(tmp_path, small_bundle, check, **changes)

    return made


def flat(params: Params) -> torch.Tensor:
    return torch.cat([params[name].reshape(-1) for name in sorted(params)])


def same_words(native: Reply, python: Reply) -> None:
    """All that does not depend on rounding is the same."""
    assert (native.error, python.error) == ("", "")
    for field in ("run_id", "round", "base_version", "kind", "client", "num_examples", "missing"):
        assert getattr(native, field) == getattr(python, field), field
    told = {name: value for name, value in native.metrics.items() if "device_" not in name}
    assert told == pytest.approx(dict(python.metrics), rel=1e-4)


SGD = {"optimizer": "sgd", "lr": 0.05}
FIRST: dict[str, dict[str, Any]] = {
    "plain": SGD,
    "decay": {**SGD, "weight_decay": 0.1, "clip_norm": None, "schedule": "linear"},
    "epochs": {**SGD, "local_epochs": 1, "batch_size": 5, "clip_norm": 0.05},
    "fedadam": {**SGD, "strategy": "fedadam"},
    "ffa_lora": {**SGD, "strategy": "ffa_lora"},
    "rslora": {**SGD, "rslora": True},
}


@pytest.mark.parametrize("name", FIRST)
def test_gradient_steps_end_where_those_of_python_do(make: Make, name: str) -> None:
    case = make(**FIRST[name])
    task = case.task()
    native, python = case.native(task, "grad"), case.python(task)
    same_words(native, python)
    found, wanted = (messages.content(reply)["adapter"] for reply in (native, python))
    assert max(float(tensor.abs().max()) for tensor in wanted.values()) > 1e-4
    assert farthest(found, wanted) < 1e-6


def test_adam_ends_where_that_of_python_does(make: Make) -> None:
    """Where a gradient is as small as Adam's epsilon, rounding alone decides the step."""
    case = make()
    task = case.task()
    native, python = case.native(task, "grad"), case.python(task)
    same_words(native, python)
    found, wanted = (flat(messages.content(reply)["adapter"]) for reply in (native, python))
    apart = (found - wanted).abs()
    assert float(apart.norm() / wanted.norm()) < 1e-3
    assert float((apart > 1e-4).float().mean()) < 1e-4


def test_three_rounds_keep_to_python(make: Make) -> None:
    """Each follows its own rounds: differences would add up."""
    case = make(**SGD)
    states = {"native": case.first, "python": case.first}
    for round in (1, 2, 3):
        replies = {
            "native": case.native(case.task(states["native"], round), "grad"),
            "python": case.python(case.task(states["python"], round)),
        }
        for name, reply in replies.items():
            adapter = tree.add(states[name]["adapter"], messages.content(reply)["adapter"])
            states[name] = {"adapter": adapter}
    assert farthest(states["native"]["adapter"], case.first["adapter"]) > 1e-3
    assert farthest(states["native"]["adapter"], states["python"]["adapter"]) < 1e-4


def test_a_frozen_a_is_kept_by_its_content(make: Make) -> None:
    case = make(strategy="ffa_lora", **SGD)
    runs = case.folder / "state" / "runs"
    old = [runs / run / f"{'9' * 32}.safetensors" for run in (core_tasks.RUN, "9" * 32)]
    for path in old:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"of another round, or of another run")
    lacking = case.native(case.task(lacks=False), "grad")
    assert not any(path.exists() for path in old)  # also where something else is missing
    assert (lacking.missing, lacking.payload) == (["A"], b"")
    assert lacking.error == "A: not held here"
    whole = case.native(case.task(), "grad")
    again = case.native(case.task(lacks=False), "grad")
    assert whole.payload == again.payload
    (held,) = (case.folder / "state" / "runs" / core_tasks.RUN).glob("*.safetensors")
    held.write_bytes(held.read_bytes()[:-1])  # a damaged file is no file
    assert case.native(case.task(lacks=False), "grad").missing == ["A"]
    lying = replace(case.task(), cached={"A": "0" * 32})
    assert "does not match its content id" in case.native(lying, "grad").error


FORWARD: dict[str, dict[str, Any]] = {
    "pool": {"strategy": "seed_pool"},
    "fp32": {"strategy": "seed_pool", "options": {"scalars": "fp32", "size": 64}, "queries": 3},
    "kerzoo": {"strategy": "seed_pool", "estimator": "kerzoo", "options": {"scalars": "fp32"}},
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_passes_measure_what_python_measures(make: Make, name: str) -> None:
    case = make(**{"eps": 1e-2, "local_steps": 6, **FORWARD[name]})
    task = case.task()
    native, python = case.native(task, "loss"), case.python(replace(task, payload=b""))
    same_words(native, python)
    assert native.payload == b""
    found, wanted = (reply.scalars["scalars"] for reply in (native, python))
    assert found["scalars"].dtype == wanted["scalars"].dtype
    assert (found["seed"], found["step"]) == (wanted["seed"], wanted["step"])
    scalars = [own["scalars"].float() for own in (found, wanted)]
    torch.testing.assert_close(*scalars, rtol=2e-3, atol=2e-3)


def test_mixed_clients_train_as_their_class(make: Make) -> None:
    own = {"trainer": "zeroth_order", "lr": 1e-3, "eps": 1e-2, "local_steps": 5}
    case = make(strategy="mixed", classes={"big": {"lr": 0.05}, "small": own}, optimizer="sgd")
    for kind, method in (("big", "grad"), ("small", "loss")):
        task = case.task(kind=kind)
        native, python = case.native(task, method, kind=kind), case.python(task)
        same_words(native, python)
        for group, params in messages.content(python).items():
            assert farthest(messages.content(native)[group], params) < 2e-3


def log_of(case: Case, rounds: int) -> Payload:
    """The state of a server after rounds of any scalars."""
    state, dtype = case.first, case.worker.strategy._dtype  # type: ignore[attr-defined]
    size = case.worker.strategy.size  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(5)
    for number in range(1, rounds + 1):
        sums = torch.randn(size, generator=generator, dtype=torch.float64) * 1e-4
        state = {**state, f"log-{number:06d}": seedlog.row(sums, dtype)}
    return state


def noted(case: Case) -> list[dict[str, Any]]:
    lines = (case.folder / "state" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def held_log(case: Case) -> Path:
    return case.folder / "state" / "runs" / core_tasks.RUN / "log.safetensors"


@pytest.mark.parametrize("scalars", ["fp16", "fp32"])
def test_a_log_leads_to_the_bits_that_python_has(make: Make, scalars: str) -> None:
    """Rows at once, rows one by one, and rows that are known in part."""
    case = make(strategy="seed_pool", options={"scalars": scalars}, local_steps=1)
    state = log_of(case, 4)
    for rows, since in ((2, 0), (3, 2), (4, 1)):
        partial = {g: p for g, p in state.items() if g <= f"log-{rows:06d}" or g[:3] != "log"}
        reply = case.native(case.task(partial, round=rows + 1, since=since), "loss")
        assert reply.error == ""
        moves = seedlog.moves(partial, case.worker.strategy.size)  # type: ignore[attr-defined]
        settled = moving.settle(case.first["start"], moves)
        line = noted(case)[-1]
        assert line["adapter_sha256"] == tree.digest(settled)
        known = list(seedlog.rows(partial).values())
        assert line["version"] == seedlog.versions(case.origin, known)[-1]
    held, facts = codec.read(str(held_log(case)))
    assert (tree.digest(held), facts["number"]) == (line["adapter_sha256"], "4")


def test_steps_move_as_python_replays_them(make: Make) -> None:
    """Where a device stands after two steps follows from their scalars, to the bit."""
    case = make(strategy="seed_pool", options={"scalars": "fp32"}, local_steps=3, eps=1e-2)
    task = case.task(log_of(case, 1), round=2)
    assert case.run(task, "loss", passes=13).returncode == 1  # three sequences, two looks a step
    stored, _ = codec.read(str(case.folder / "state" / "checkpoint.safetensors"))
    sent = case.native(task, "loss").scalars["scalars"]
    assert stored["scalars"].equal(sent["scalars"][:2])
    w, _ = moving.flatten(moving.settle(case.first["start"], seedlog.moves(log_of(case, 1), 512)))
    pool = SignPool(512, (int(case.first["key"]["seed"]), 2))
    chosen = signs.choices(int(sent["seed"]), 2, 512).tolist()
    for k, g in zip(chosen, stored["scalars"].tolist(), strict=True):
        pool.add(w, 0, [(k, float(sent["step"]) * g)])
    assert tree.digest({"w": stored["point"]}) == tree.digest({"w": w})


def test_a_snapshot_is_as_good_as_its_rows(make: Make) -> None:
    case = make(strategy="seed_pool", options={"scalars": "fp32"}, local_steps=2)
    state = log_of(case, 3)
    by_rows = case.native(case.task(state, round=4), "loss", state="rows")
    start = moving.settle(case.first["start"], seedlog.moves(state, 512))
    task = case.task(state, round=4, lacks=False)
    assert task.log is not None
    sent, _ = messages.enclose({"start": start})
    log = replace(task.log, since=task.log.version, rows=(), start=codec.content_id(start))
    by_start = case.native(replace(task, log=log, payload=sent), "loss")
    torch.testing.assert_close(
        by_start.scalars["scalars"]["scalars"], by_rows.scalars["scalars"]["scalars"]
    )
    other, _ = messages.enclose({"start": tree.scale(start, 2.0)})
    lying = replace(task, log=log, payload=other)
    assert "does not match" in case.native(lying, "loss", state="fresh").error


def test_a_log_that_does_not_fit_is_refused(make: Make) -> None:
    case = make(strategy="seed_pool", local_steps=1)
    task = case.task(log_of(case, 2), round=3)
    assert task.log is not None
    lost = case.native(case.task(log_of(case, 2), round=3, since=1), "loss")
    assert (lost.missing, lost.error) == (["log"], "log: not held here")
    wrong = {
        "do not lead to": replace(task.log, version="0" * 32),
        "this device starts from version": replace(task.log, origin="1" * 32, since="1" * 32),
        "log ends at row": replace(task.log, number=7),
    }
    wrong["this device starts from version"] = replace(
        wrong["this device starts from version"],
        version=seedlog.versions("1" * 32, list(task.log.rows))[-1],
    )
    for text, log in wrong.items():
        assert text in case.native(replace(task, log=log), "loss").error
    assert not held_log(case).exists()


def test_steps_are_told_with_what_they_cost(make: Make) -> None:
    case = make(strategy="seed_pool", eps=1e-2)
    told = case.native(case.task(), "loss").metrics
    assert 0 < told["device_step_ms_p50"] <= told["device_step_ms_p95"]
    assert 0 < told["device_perturb_share"] < 0.5
    assert 1e6 < told["device_peak_rss_bytes"] < 60e6
    assert 0 < told["device_seconds"] < 300
    assert told["device_loss_first"] > 0 < told["device_loss_last"]


def test_a_distance_that_the_base_does_not_bear_is_not_used(make: Make) -> None:
    """Beyond what the manifest says is sound, it is as if the run had asked for the limit."""
    replies = []
    told = json.loads((make().bundle / "manifest.json").read_text())
    most = next(own["eps"][1] for own in told["programs"] if own["name"] == "fp32")
    for eps in (most, 10 * most):
        case = make(strategy="seed_pool", options={"scalars": "fp32"}, eps=eps, local_steps=2)
        replies.append(case.native(case.task(), "loss").scalars["scalars"]["scalars"])
    torch.testing.assert_close(*replies, rtol=1e-2, atol=1e-2)


def test_longer_sequences_are_cut(make: Make) -> None:
    """To what a gateway assigns: the targets beyond do not count."""
    case = make(**SGD)
    whole, cut = (case.native(case.task(), "grad", length=n).metrics for n in (0, 16))
    assert cut["target_tokens"] < whole["target_tokens"]
    assert cut["target_tokens"] <= 4 * 3 * 15
