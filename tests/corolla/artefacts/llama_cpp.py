"""llama.cpp itself, by the wheel of xllamacpp: what it says to the tokens of a prompt."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

CANDIDATES = 10


class LlamaCpp:
    """A GGUF model in this process, in fp32 on one thread, with or without an adapter's file."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        library = pytest.importorskip("xllamacpp", reason="in the dev extra, where it has a wheel")
        self.model = model
        given = library.CommonParams()
        given.model.path = str(model)
        given.n_ctx, given.n_parallel, given.n_gpu_layers = 256, 1, 0
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
        given.cache_type_k = given.cache_type_v = library.ggml_type.GGML_TYPE_F32
        given.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        given.warmup, given.verbosity, given.port = False, -1, 0
        given.offline = True
        if adapter:
            given.lora_adapters = [library.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = library.Server(given)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, with those that the model wants around it."""
        asked = {"content": text, "add_special": True, "parse_special": False}
        found: list[int] = self._ask("tokenize", asked)["tokens"]
        return found

    def greedy(self, prompt: Sequence[int], count: int) -> list[dict[int, float]]:
        """The likeliest tokens of each step and their log probabilities, the chosen one first."""
        asked = {
            "prompt": list(prompt),
            "n_predict": count,
            "temperature": 0.0,
            "n_probs": CANDIDATES,
            "cache_prompt": False,
            "samplers": ["temperature"],
            "return_tokens": True,
        }
        answer = self._ask("completion", asked)
        steps = answer["completion_probabilities"]
        assert [step["id"] for step in steps] == answer["tokens"], "a step without probabilities"
        return [{top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in steps]

    def _ask(self, what: str, asked: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{what}",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())
