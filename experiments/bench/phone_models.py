"""Language models of the size of a phone's, with random weights: what costs time and memory.

python -m experiments.bench.phone_models OUT [--size m]
"""

import argparse
from pathlib import Path

import torch
import transformers

from corolla.embedded.assets import asset

SIZES = {
    # 16 million parameters: a step is long enough to measure, an export takes minutes
    "m": {
        "vocab_size": 8192,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    # 163 million: the shape of SmolLM2-135M (Allal et al., arXiv 2502.02737) with its own head
    "l": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


def write(folder: Path, size: str = "m") -> Path:
    """A Llama of `size` with weights from seed 0 and the tokenizer of the embedded model."""
    config = transformers.LlamaConfig(
        **SIZES[size],
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(asset("model")).save_pretrained(folder)
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="m")
    args = parser.parse_args()
    print(write(args.out, args.size))


if __name__ == "__main__":
    main()
