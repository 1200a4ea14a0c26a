"""Demands on an adapter of the programs that serve adapters, as said by their documentation."""

from collections.abc import Sequence

from corolla.artefacts.adapters import SavedLora

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""
LARGEST = 256
"""The largest rank that Ollama's and vLLM's users find served without more."""
SMALLEST = 8


def max_lora_rank(rank: int) -> int | None:
    """Returns the --max-lora-rank that an adapter needs; None where no value is enough."""
    return next((allowed for allowed in RANKS if rank <= allowed), None)


def unmet(saved: SavedLora) -> Sequence[str]:
    """A sentence for each demand that an adapter does not meet; none: servers take it as it is.

    Of vLLM: rank from 8 to 256, no tensors beside the factors, one rank for all modules, names of
    peft. Of llama.cpp's converter and Ollama: the same tensors, no rank stabilisation to know of.
    """
    config, told = saved.config, []
    if not SMALLEST <= saved.spec.rank <= LARGEST:
        advice = f"corolla export --to adapter --rank {LARGEST}"
        small = f"pad it, or train with rank={SMALLEST}"
        told.append(
            f"its rank is {saved.spec.rank}, servers take {SMALLEST} to {LARGEST}: "
            f"{advice if saved.spec.rank > LARGEST else small}"
        )
    if saved.heads or config.get("modules_to_save"):
        told.append("it brings a head beside its factors (modules_to_save): merge it")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        told.append("its modules have ranks of their own (rank_pattern): export it again")
    if saved.spec.rslora:
        told.append("its scaling is rank-stabilised, which not all know: export it again")
    if odd := [name for name in saved.update if not name.endswith((".lora_A", ".lora_B"))]:
        told.append(f"{odd[0]} is no name of peft's LoRA")
    base = str(config.get("base_model_name_or_path") or "")
    if not base or base.startswith(("/", "\\", "~")) or base[1:2] == ":":
        told.append("its base model is a path of one machine: name it as others have it")
    return told
