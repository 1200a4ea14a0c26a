"""Train the embedded base model: a causal language model of about one million parameters.

The corpus is the English text that comes with Python: the language reference kept for
``help()`` and the docstrings of those standard-library modules that are *not* clients of the
embedded data set, so that the clients' data is new to the model.  Run it as::

    python experiments/embedded/train_base.py
"""

import argparse
import ast
import csv
import datetime
import hashlib
import math
import platform
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from build_data import OUTPUT_DIR, collect_examples, read_psf_source, stdlib_files

MODEL_DIR = OUTPUT_DIR / "model"
SEED = 0
THREADS = 2

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB_SIZE = 2048
MAX_POSITION = 512

MAX_DOCUMENT_CHARS = 2000  # Longer texts are split between paragraphs.
MIN_PARAGRAPH_CHARS = 20
HELD_OUT_PERCENT = 3

SEQUENCE = 256
BATCH = 8
STEPS = 1500
WARMUP_STEPS = 60
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
EVAL_EVERY = 100


# --- Corpus ---------------------------------------------------------------------------------


def reference_topics() -> list[str]:
    """Return the texts of the language reference that ``help()`` shows."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return [topics[name] for name in sorted(topics)]
    raise ValueError("pydoc_data/topics.py holds no topics")


def other_docstrings(clients: frozenset[str]) -> Iterator[str]:
    """Yield every docstring, public or not, of the modules that belong to no client."""
    for module, path in stdlib_files():
        if module.split(".")[0] in clients or module.startswith("pydoc_data"):
            continue
        source = read_psf_source(path)
        if source is None:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield docstring


def paragraphs(text: str) -> list[str]:
    """Split a text at its blank lines."""
    return [part.rstrip() for part in re.split(r"\n\s*\n", text.strip("\n")) if part.strip()]


def documents() -> list[str]:
    """Return the corpus: documents of moderate length in which no paragraph occurs twice."""
    examples = collect_examples()
    clients = frozenset(example["client_id"] for example in examples)
    # A client's paragraph that another module repeats is left out of the corpus as well.
    seen = {paragraph for example in examples for paragraph in paragraphs(example["response"])}
    result: list[str] = []
    for text in [*reference_topics(), *other_docstrings(clients)]:
        document = ""
        for paragraph in paragraphs(text):
            if paragraph in seen or len(paragraph) < MIN_PARAGRAPH_CHARS:
                continue
            seen.add(paragraph)
            if document and len(document) + len(paragraph) > MAX_DOCUMENT_CHARS:
                result.append(document)
                document = ""
            document += ("\n\n" if document else "") + paragraph
        if document:
            result.append(document)
    return result


def is_held_out(document: str) -> bool:
    """Tell whether a document belongs to the held-out slice (by a hash of its text)."""
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


# --- Tokenizer and model --------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts <|bos|> in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITION,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def create_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Create the model with random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=352,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The library initialises weights from the global random state; the fork restores it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return LlamaForCausalLM(config)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return all texts as one row of tokens, each between <|bos|> and <|eos|>."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text + EOS, truncation=False, verbose=False)["input_ids"]
    return torch.tensor(ids)


# --- Training -------------------------------------------------------------------------------


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the factor of a linear warm-up followed by a cosine decay to one twentieth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Return the mean loss per token over consecutive windows of a row of tokens."""
    model.train(False)
    windows = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    losses = [
        float(model(input_ids=batch, labels=batch).loss) * len(batch)
        for batch in torch.split(windows, BATCH)
    ]
    model.train()
    return sum(losses) / len(windows)


def train(
    model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, steps: int
) -> list[tuple[int, float, float]]:
    """Train the model in place; return (step, train loss, held-out loss) along the way."""
    generator = torch.Generator().manual_seed(SEED)
    # Norms are not decayed.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    positions = torch.arange(SEQUENCE)
    curve: list[tuple[int, float, float]] = []
    recent: list[float] = []  # Train losses since the last evaluation.
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("Training", total=steps)
        for step in range(1, steps + 1):
            starts = torch.randint(len(tokens) - SEQUENCE, (BATCH, 1), generator=generator)
            batch = tokens[starts + positions]
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            recent.append(loss.item())
            progress.advance(task)
            if step % EVAL_EVERY == 0 or step == steps:
                curve.append((step, sum(recent) / len(recent), evaluate(model, held_out)))
                recent.clear()
                progress.console.print("step {}: train {:.3f}, held-out {:.3f}".format(*curve[-1]))
    return curve


# --- Output ---------------------------------------------------------------------------------


def model_card(
    *,
    parameters: int,
    corpus: tuple[int, int, int, int],
    curve: list[tuple[int, float, float]],
    final_loss: float,
    minutes: float,
) -> str:
    """Return the text of the model card."""
    texts, characters, train_tokens, held_out_tokens = corpus
    steps = curve[-1][0]
    rows = "\n".join(f"| {step} | {loss:.3f} | {held:.3f} |" for step, loss, held in curve)
    return f"""# Model card: the embedded base model

A causal language model of {parameters:,} parameters, small enough to live in the repository. It
makes examples and tests of federated LoRA fine-tuning run offline in seconds on a CPU. It is not
useful for anything else.

## Architecture

`LlamaForCausalLM`: hidden size 128, 4 layers, 4 attention heads with 2 key/value heads,
intermediate size 352, tied embeddings, {MAX_POSITION} positions. Byte-level BPE tokenizer with
{VOCAB_SIZE} tokens; `{BOS}` is put in front of every text, `{EOS}` ends one, `{PAD}` pads. There
is no chat template. The weights are stored in bfloat16; load them with `dtype=torch.float32` to
train on a CPU.

## Corpus

{texts:,} documents, {characters:,} characters, from Python {platform.python_version()}:

- the language reference in `pydoc_data/topics.py`;
- the docstrings of the standard library's modules, except the packages that are clients of the
  embedded data set (`../data.jsonl`), whose texts are therefore new to the model, and except
  files with a licence notice of their own.

No paragraph occurs twice. {HELD_OUT_PERCENT} % of the documents ({held_out_tokens:,} tokens)
are held out, {train_tokens:,} tokens are trained on.

## Training

    python experiments/embedded/train_base.py

AdamW (learning rate {LEARNING_RATE:g}, weight decay {WEIGHT_DECAY:g}, warm-up and cosine decay),
{steps} steps of {BATCH} sequences of {SEQUENCE} tokens ({steps * BATCH * SEQUENCE / 1e6:.1f}
million tokens), seed {SEED}. PyTorch {torch.__version__.split("+")[0]}, Transformers
{transformers.__version__}. Measured on {datetime.date.today().isoformat()} on {THREADS} CPU cores:
{minutes:.1f} minutes.

Loss per token (nats):

| Step | Train | Held-out |
|---:|---:|---:|
{rows}

The weights as stored (bfloat16) have a held-out loss of {final_loss:.3f}. The same numbers are in
`losses.csv`. Another version of Python or PyTorch gives slightly different weights.

## Limits

It continues text in the manner of reference documentation, without regard to truth. English
only. It was trained on sequences of {SEQUENCE} tokens; beyond that its quality is unknown.

## Licence

The weights are released under the project's licence. The corpus is Copyright © Python Software
Foundation and used under the Python Software Foundation License Version 2, see
`../LICENSE-PSF.txt`.
"""


def main() -> None:
    """Train the tokenizer and the model and write both with their card."""
    parser = argparse.ArgumentParser(description="Train the embedded base model.")
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="output directory")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    started = time.monotonic()

    texts = documents()
    train_texts = [text for text in texts if not is_held_out(text)]
    tokenizer = train_tokenizer(train_texts)
    tokens = encode(train_texts, tokenizer)
    held_out = encode([text for text in texts if is_held_out(text)], tokenizer)
    characters = sum(map(len, texts))
    print(
        f"{len(texts)} documents, {characters:,} characters, {len(tokens):,} training tokens, "
        f"{len(held_out):,} held-out tokens"
    )

    model = create_model(tokenizer)
    curve = train(model, tokens, held_out, arguments.steps)
    model.bfloat16()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    minutes = (time.monotonic() - started) / 60
    stored = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    final_loss = evaluate(stored, held_out)
    print(f"stored weights: held-out loss {final_loss:.3f}; {minutes:.1f} minutes")
    with (output / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "train_loss", "held_out_loss"])
        writer.writerows((step, f"{loss:.4f}", f"{held:.4f}") for step, loss, held in curve)
    card = model_card(
        parameters=model.num_parameters(),
        corpus=(len(texts), characters, len(tokens), len(held_out)),
        curve=curve,
        final_loss=final_loss,
        minutes=minutes,
    )
    (output / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
