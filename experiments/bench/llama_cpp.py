"""Real models through llama.cpp: what it says to the files that Corolla writes, beside peft.

    python -m experiments.bench.llama_cpp --model smollm2-135m-instruct --adapter RUN/adapter
    python -m experiments.bench.llama_cpp --model gemma-3-270m --json FILE

Without an adapter a random one is made, far from zero. llama.cpp (xllamacpp, in the dev extra)
computes in this process, in fp32 on one thread; beside it stand plain transformers and peft.
Sections:

tokens: 200 texts, and 20 with special tokens, by the tokenizer that a run uses and by llama.cpp.
base: a packaged model's own quantised file, and what a run makes of it: first tokens of prompts.
exports: adapter and merged model in each type: greedy tokens and likeliest log probabilities.

README.md says how to read it.
"""

import gc
import json
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor

from corolla.artefacts import gguf_files
from corolla.artefacts.weights import open_weights
from corolla.commands.export.order import Order, export
from corolla.config.run import RunConfig
from corolla.embedded.assets import asset
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.tensors import factors
from corolla.types import Adapter, LoraSpec
from experiments.bench.zeroth_order import Ratio, Section, command

CANDIDATES, STEPS, PROMPTS, TEXTS = 10, 20, 20, 200
NEAR = 1e-3
"""A difference of log probabilities at which sums in another order may choose the other token."""
BAR = 1e-2
"""The largest difference of log probabilities that f32 files may have."""
HARD = (
    *("", " ", "\n", "\n\n", "\t x", " a  b", "  lead", "trail  ", "a\r\nb", "\x00\x01", "\u00a0x"),
    *("2026-12-01", "a1b22 333 4444", "price: $12,345.67", "½ ² ①", "٣٤٥", "हिन्दी १२३", "𝟘𝟙𝟚"),
    *(
        "größe 東京 🌸",
        "naïve café",
        "Ελληνικά",
        "русский текст 123",
        "العربية",
        "한국어",
        "👩‍👩‍👧",
    ),
    *("don't I'LL we've", "It's 1234 o'clock, isn't it?", "def f(x):\n    return  x\n\n"),
)
"""Texts that tokenizers cut otherwise than one would think."""


class LlamaCpp:
    """A GGUF model in this process, in fp32 on one thread, with or without an adapter's file."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        import xllamacpp

        self.model = model
        given = xllamacpp.CommonParams()
        given.model.path = str(model)
        given.n_ctx, given.n_parallel, given.n_gpu_layers = 256, 1, 0
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
        given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        given.warmup, given.verbosity, given.port = False, -1, 0
        given.offline = True
        if adapter:
            given.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(given)

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text, with those that the model wants around it."""
        asked = {"content": text, "add_special": True, "parse_special": special}
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
        if [step["id"] for step in steps] != answer["tokens"]:
            raise ValueError("llama.cpp told a step without probabilities")
        return [{top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in steps]

    def _ask(self, what: str, asked: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{what}",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], steps: int = STEPS) -> Sequence[Tensor]:
    """The log probabilities of each greedy step, up to the end of a text, by transformers."""
    ids = torch.tensor([prompt])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return [told[0].double().log_softmax(-1) for told in found.logits]


@dataclass
class Agreement:
    """How far llama.cpp says the same as transformers, over the steps of all prompts."""

    steps: int = 0
    equal: int = 0
    near: int = 0
    """Prompts whose comparison ended where the first two candidates were too near."""
    other: int = 0
    """Prompts whose comparison ended at another token."""
    ended: int = 0
    """Prompts where only one of the two ended its text."""
    apart: float = 0.0
    """The largest difference of log probabilities of llama.cpp's likeliest tokens."""
    apart_mean: float = 0.0

    @property
    def met(self) -> bool:
        """True where the bar of f32 files is met."""
        return self.apart <= BAR and not self.other and not self.ended


def agree(
    reader: LlamaCpp, prompts: Sequence[Sequence[int]], steps: Sequence[Sequence[Tensor]]
) -> Agreement:
    """Compare greedy steps of llama.cpp with `steps`, log probabilities by transformers."""
    found, differences = Agreement(), list[float]()
    for prompt, told in zip(prompts, steps, strict=True):
        theirs = reader.greedy(prompt, len(told))
        for own, candidates in zip(told, theirs, strict=False):
            found.steps += 1
            differences += [abs(value - float(own[token])) for token, value in candidates.items()]
            first, second = own.topk(2).values.tolist()
            if first - second < NEAR:
                found.near += 1
                break
            if next(iter(candidates)) != int(own.argmax()):
                found.other += 1
                break
            found.equal += 1
        else:
            found.ended += len(theirs) != len(told)
    found.apart = max(differences)
    found.apart_mean = sum(differences) / len(differences)
    return found


def write_base(folder: Path, path: Path) -> Path:
    """The base model of a folder alone as GGUF in f32, its tokenizer written anew."""
    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = gguf_files.GgufModel(config, tokenizer, "base")
    gguf_files.write_model(path, model, open_weights(str(folder), {}), "f32")
    return path


def make_adapter(folder: Path, model: str, spec: LoraSpec, size: float) -> Path:
    """Write a random adapter on all linear layers, as a run saves it; B is `size` times normal."""
    trained = LoraModel(pretrained.load(RunConfig(model=model, max_length=64, device="cpu")))
    noise = torch.Generator().manual_seed(3)
    params = {
        name: tensor + size * torch.randn(tensor.shape, generator=noise)
        if factors.is_b(name)
        else tensor
        for name, tensor in trained.init(spec, 1).items()
    }
    trained.save(folder, Adapter(params), spec)
    return folder


# --- the bench ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The files and prompts that are compared. The fields are the options of the command."""

    model: str = field(default="embedded", metadata={"help": "as for corolla simulate"})
    adapter: str = field(default="", metadata={"help": "a folder; none: a random one is made"})
    threads: int = field(default=1, metadata={"help": "of the CPU, for transformers"})
    prompts: int = field(default=PROMPTS, metadata={"help": "that are gone on with"})
    types: str = field(default="f32,f16,q8_0", metadata={"help": "that are exported"})


@cache
def _lines() -> Sequence[dict[str, str]]:
    lines = asset("data.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Texts of the embedded data: as chat turns where there is a template, and as they are."""
    found = []
    for i, row in enumerate(_lines()[:: len(_lines()) // count][:count]):
        if tokenizer.chat_template and i % 2:
            turns = [{"role": "user", "content": row["prompt"][:80]}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            found.append(tokenizer(row["response"][20 : 60 + 3 * i])["input_ids"])
    return [list(ids) for ids in found]


def tokens(options: Options) -> Section:
    """Texts cut by the tokenizer of a run, by llama.cpp with the base's file, and with ours."""
    own = pretrained.load_tokenizer(options.model)
    rows = _lines()[:: len(_lines()) * 2 // (TEXTS - len(HARD))]
    texts = [*HARD, *(text for row in rows for text in (row["prompt"], row["response"]))][:TEXTS]
    marks = [t.content for t in own.added_tokens_decoder.values() if t.special][:10]
    marked = [f"{mark}user\n{text}{marks[-1]}\n" for mark in marks for text in HARD[-2:]][:20]
    found = Section(f"tokens, {options.model}")
    with tempfile.TemporaryDirectory() as scratch:
        files = {
            "written here": write_base(
                Path(pretrained.resolve(options.model)), Path(scratch, "base.gguf")
            )
        }
        if theirs := pretrained.gguf_of(options.model):
            files["its own file"] = theirs
        for name, path in files.items():
            reader = LlamaCpp(path)
            for kind, asked, special in (("texts", texts, False), ("special", marked, True)):
                odd = [
                    text
                    for text in asked
                    if reader.tokens(text, special) != _ids(own, text, special)
                ]
                row: Ratio = {
                    "ratio": f"{kind}, {name}",
                    "compared": len(asked),
                    "differ": len(odd),
                }
                found.ratios.append({**row, "bar": "0", "met": not odd})
                found.notes += [f"{name}: {text!r} differs" for text in odd[:5]]
            del reader
    return found


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """The ids by transformers; without `special`, marks in a text are text."""
    return list(tokenizer(text, split_special_tokens=not special)["input_ids"])


def base(options: Options) -> Section:
    """The first tokens after prompts of a base's own quantised file, and of what is made of it."""
    found = Section(f"base, {options.model}")
    theirs = pretrained.gguf_of(options.model)
    if theirs is None:
        found.notes.append("the model came from no GGUF file")
        return found
    folder = pretrained.resolve(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole = _prompts(transformers.AutoTokenizer.from_pretrained(folder), options.prompts)
    prompts = [ids[: len(ids) - cut] for ids in whole for cut in range(5) if len(ids) - cut > 3]
    reader, first, differences = LlamaCpp(theirs), 0, list[float]()
    for prompt in prompts:
        (told,) = greedy(model, prompt, 1)
        (candidates,) = reader.greedy(prompt, 1)
        first += next(iter(candidates)) == int(told.argmax())
        differences += [abs(value - float(told[token])) for token, value in candidates.items()]
    differences.sort()
    found.rows.append(
        {
            "case": "likeliest tokens of llama.cpp",
            "prompts": len(prompts),
            "first is the same": first / len(prompts),
            "median |difference|": differences[len(differences) // 2],
            "95 % within": differences[len(differences) * 95 // 100],
            "largest": differences[-1],
        }
    )
    found.notes.append("llama.cpp rounds activations to 8 bits before products with such weights")
    return found


def exports(options: Options) -> Section:
    """Greedy steps of each file that is exported, beside transformers and peft."""
    found = Section(
        f"exports, {options.model}, {Path(options.adapter).parent.name or 'random'} adapter"
    )
    folder = Path(pretrained.resolve(options.model))
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(options.adapter or Path(scratch, "adapter"))
        if not options.adapter:
            make_adapter(given, options.model, LoraSpec(8, 16.0), 0.02)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        prompts = _prompts(tokenizer, options.prompts)
        bare = [greedy(model, prompt, 1)[0] for prompt in prompts]
        tuned = PeftModel.from_pretrained(model, str(given)).eval()
        steps = [greedy(tuned, prompt) for prompt in prompts]
        moved = max(float((own[0] - was).abs().max()) for own, was in zip(steps, bare, strict=True))
        found.notes.append(f"the adapter moves log probabilities by up to {moved:.2f}")
        del model, tuned, bare
        gc.collect()
        alone = write_base(folder, Path(scratch, "base.gguf"))
        for kind in options.types.split(","):
            out = Path(scratch, kind)
            export(Order(given, "gguf", options.model, out, kind))
            for name, base_file, adapter in (
                ("merged", out / f"model-{kind}.gguf", None),
                ("adapter on the base in f32", alone, out / f"adapter-{kind}.gguf"),
            ):
                agreement = agree(LlamaCpp(base_file, adapter), prompts, steps)
                row: Ratio = {"ratio": f"{kind}, {name}", **asdict(agreement)}
                exact = kind == "f32"
                row |= {"bar": f"≤ {BAR:g}, equal" if exact else ""}
                row |= {"met": agreement.met if exact else None}
                found.ratios.append(row)
                gc.collect()
    return found


SECTIONS: dict[str, Callable[[Options], Section]] = {
    "tokens": tokens,
    "base": base,
    "exports": exports,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the sections asked for, print tables, write the JSON file."""
    return command(__doc__, Options, SECTIONS, (), _untaken, arguments)


def _untaken(name: str, options: Options) -> None:
    """Measures nothing: no section needs a process of its own."""


if __name__ == "__main__":
    sys.exit(main())
