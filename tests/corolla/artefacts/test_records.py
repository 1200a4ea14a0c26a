import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from corolla.artefacts import records
from corolla.config.run import RunConfig
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.storage import folders
from corolla.types import LoraSpec, Update
from corolla.wire import codec

Settings = Callable[..., RunConfig]

HOSTILE = [
    "../x",
    "a/b",
    "..",
    ".",
    "/etc/passwd",
    "a\\b",
    "C:\\x",
    "a\x00b",
    "a\nb",
    "~",
    "-rf",
    "日本",
    "é",
    "e\u0301",
    "a%2Fb",
    'con: <x>|?*"',
    "ada.part",
    "ada",
    "x" * 1000,
    "日" * 200,
    "",
]


@pytest.mark.parametrize("client", HOSTILE, ids=lambda client: repr(client)[:20])
def test_any_name_becomes_one_folder(tmp_path: Path, client: str) -> None:
    folder = folders.client_folder(tmp_path, client)
    assert folder.parent == tmp_path
    assert folder.name not in ("", ".", "..")
    folder.mkdir()
    assert folder.resolve() == tmp_path.resolve() / folder.name


def test_no_two_names_share_a_folder(tmp_path: Path) -> None:
    names = [*HOSTILE, "x" * 1001, "日" * 201, "%2E%2E", "a%2fb", "_", "-"]
    assert len({folders.client_folder(tmp_path, client) for client in names}) == len(names)


def test_plain_names_stay_readable(tmp_path: Path) -> None:
    assert folders.client_folder(tmp_path, "client-07") == tmp_path / "client-07"
    assert folders.client_folder(tmp_path, "Ada (phone)") == tmp_path / "Ada (phone)"
    assert folders.round_folder(tmp_path, 7) == tmp_path / "round-007"
    assert folders.round_folder(tmp_path, 12345) == tmp_path / "round-12345"


def test_an_update_is_loaded_by_plain_peft(
    settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    model = LoraModel(pretrained.load(settings()))
    spec = LoraSpec(2, 4.0)
    noise = torch.Generator().manual_seed(0)
    params = {n: torch.randn(t.shape, generator=noise) for n, t in model.init(spec, 0).items()}
    model.write(params, spec)
    update = Update({}, 7, {"train_loss": 0.5})
    records.write_update(tmp_path / "ada", model, spec, update, "ada")
    facts = json.loads((tmp_path / "ada" / "update.json").read_text())
    assert facts == {
        "client": "ada",
        "num_examples": 7,
        "rank": 2,
        "alpha": 4.0,
        "metrics": {"train_loss": 0.5},
    }
    ids = torch.arange(2, 20)[None]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name in [n.removesuffix(".lora_A") for n in params if n.endswith(".lora_A")]:
            # scaling alpha / r = 2
            weights[name + ".weight"] += 2.0 * params[name + ".lora_B"] @ params[name + ".lora_A"]
        wanted = plain(input_ids=ids).logits
        fresh = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
        tuned = PeftModel.from_pretrained(fresh, str(tmp_path / "ada")).eval()
        torch.testing.assert_close(tuned(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_an_update_with_frozen_blocks_holds_them(settings: Settings, tmp_path: Path) -> None:
    """Stacked: the product is that of the blocks and of the client's own adapter."""
    model = LoraModel(pretrained.load(settings()))
    spec = LoraSpec(2, 4.0)
    noise = torch.Generator().manual_seed(0)
    params, block = (
        {n: torch.randn(t.shape, generator=noise) for n, t in model.init(spec, 0).items()}
        for _ in range(2)
    )
    model.write(params, spec, [block])
    records.write_update(tmp_path / "ada", model, spec, Update({}, 1), "ada")
    config = json.loads((tmp_path / "ada" / "adapter_config.json").read_text())
    saved = codec.read(str(tmp_path / "ada" / "adapter_model.safetensors"))[0]
    scaling = config["lora_alpha"] / config["r"]
    for name in [n.removesuffix(".lora_A") for n in params if n.endswith(".lora_A")]:
        a = saved[f"base_model.model.{name}.lora_A.weight"]
        b = saved[f"base_model.model.{name}.lora_B.weight"]
        wanted = 2.0 * params[name + ".lora_B"] @ params[name + ".lora_A"]
        wanted = wanted + block[name + ".lora_B"] @ block[name + ".lora_A"]
        torch.testing.assert_close(scaling * b @ a, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "examples", [{"ada": 1, "ben": 3}, {"a/b": 7}, {str(i): i for i in range(1, 9)}]
)
def test_weights_sum_to_one(tmp_path: Path, examples: dict[str, int]) -> None:
    for client in examples:
        folder = folders.client_folder(tmp_path, client)
        folder.mkdir()
        (folder / "update.json").write_text(json.dumps({"client": client}))
    records.write_weights(tmp_path, examples)
    found = {}
    for path in tmp_path.glob("*/update.json"):
        facts = json.loads(path.read_text())
        found[facts["client"]] = facts["weight"]
    total = sum(examples.values())
    assert found == {client: n / total for client, n in examples.items()}
    assert sum(found.values()) == pytest.approx(1.0)
