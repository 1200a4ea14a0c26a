"""Reads what a run has saved as anybody does: a process of its own, with transformers and peft.

`python -m corolla.evaluation.reader` takes a Request as one line of JSON on standard input. It
knows no run and shares no memory with one: the base comes from its files, under another seed. The
answer is two files in the folder of the request; what fails is one line that begins with "error: ".
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from corolla.evaluation.other_process import ANSWER, LOGITS, ROWS, Answer, Request
from corolla.host.processes import when_orphaned
from corolla.tensors import tree

_VALUES = 1 << 24
"""Logits that are compared at most: 64 MB, whatever the vocabulary."""
_IGNORE = -100
"""Label of a token that is no target, to torch and transformers."""


@torch.no_grad()
def measure(model: Any, rows: dict[str, Tensor]) -> tuple[Tensor, float]:
    """(logits in fp32 on the CPU, (n, classes); mean loss of all targets), a row at a time.

    The logits are those of every row of a classifier; else of tokens at even distances, as many as
    _VALUES allow.
    """
    logits, losses, targets = [], 0.0, 0
    labels, mask = rows["labels"], rows["attention_mask"].bool()
    for row in range(len(labels)):
        inputs = {n: rows[n][row : row + 1] for n in ("input_ids", "attention_mask")}
        found = model(**inputs).logits.float()
        if labels.dim() == 1:
            wanted = labels[row : row + 1]
        else:
            found = found[0, -mask.shape[1] :]  # virtual tokens come first
            at = mask[row].nonzero()[:, 0]
            most = max(1, _VALUES // (len(labels) * found.shape[-1]))
            if len(at) > most:
                at = at[torch.linspace(0, len(at) - 1, most, device=at.device).round().long()]
            logits.append(found[at].cpu())
            found, wanted = found[:-1], labels[row, 1:]
        if labels.dim() == 1:
            logits.append(found.cpu())
        losses += float(
            functional.cross_entropy(found, wanted, ignore_index=_IGNORE, reduction="sum")
        )
        targets += int((wanted != _IGNORE).sum())
    return torch.cat(logits), losses / max(1, targets)


def read(request: Request) -> None:
    """Load, measure, and write the answer."""
    torch.set_num_threads(request.threads)
    torch.manual_seed(request.seed)
    model, drawn, stored = _load(request)
    device = torch.device(request.device)
    rows = {n: t.to(device) for n, t in load_file(Path(request.scratch) / ROWS).items()}
    logits, loss = measure(model.eval(), rows)
    save_file({"logits": logits.contiguous()}, Path(request.scratch) / LOGITS)
    answer = json.dumps(asdict(Answer(loss, stored, drawn)))
    (Path(request.scratch) / ANSWER).write_text(answer, encoding="utf-8")


def _load(request: Request) -> tuple[Any, list[str], str]:
    """(the model, what is random in it, the hash of the checkpoint), by transformers and peft."""
    auto: Any = AutoModelForSequenceClassification if request.labels else AutoModelForCausalLM
    kwargs: dict[str, Any] = {"dtype": getattr(torch, request.dtype), "output_loading_info": True}
    kwargs["trust_remote_code"] = False
    if request.quantised:
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(**request.quantised)
    source = request.saved
    if not request.whole:
        source = request.base
        kwargs |= {"num_labels": request.labels} if request.labels else {}
        kwargs |= {"ignore_mismatched_sizes": True} if request.new_head else {}
    base, found = auto.from_pretrained(source, **kwargs)
    # A whole model brings the head that its base is without.
    missing = {*found["missing_keys"], *(() if request.whole else request.new_head)}
    stored = tree.digest({n: t for n, t in base.state_dict().items() if n not in missing})
    if not request.quantised:
        base = base.to(request.device)
    # A decoder that classifies looks for the last token before the padding.
    base.config.pad_token_id = base.config.get_text_config().pad_token_id = request.pad_id
    if request.whole:
        return base, sorted(missing), stored
    model = PeftModel.from_pretrained(base, request.saved)
    brought = _brought(Path(request.saved))
    return model, sorted(name for name in missing if name not in brought), stored


def _brought(adapter: Path) -> set[str]:
    """Tensors of the base model that an adapter brings along, by their names there."""
    named = load_file(adapter / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.") for name in named}


def main() -> int:
    """Take one request; 0 when it is answered, or nobody asks."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    when_orphaned(lambda: os._exit(1))
    try:
        read(Request(**json.loads(line)))
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise is the answer
        reason = " ".join(str(error).split())[:300]
        print(f"error: {type(error).__name__}: {reason}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
