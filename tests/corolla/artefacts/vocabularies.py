"""Small tokenizers as those of real models are made: bytes, or SentencePiece."""

from collections.abc import Sequence
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from corolla.embedded.assets import asset

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@cache
def _lines() -> Sequence[str]:
    return asset("data.jsonl").read_text(encoding="utf-8").splitlines()[:400]


def of_bytes(
    pieces: pre_tokenizers.PreTokenizer | None,
    bos: bool = False,
    whole: bool = False,
    more: str = "",
) -> PreTrainedTokenizerBase:
    """Merges of bytes, after `pieces` have cut a text; with `bos` before each text.

    They are learnt from the embedded data, and from a text more.
    """
    raw = Tokenizer(models.BPE(ignore_merges=whole))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pieces is None)
    raw.pre_tokenizer = (
        pre_tokenizers.Sequence([pieces, bytes_of]) if pieces is not None else bytes_of
    )
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [*_lines(), more],
        trainers.BpeTrainer(
            vocab_size=600,
            show_progress=False,
            special_tokens=["<|begin|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|begin|>" if bos else None,
        eos_token="<|end|>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    )


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """What cuts a text into the matches of a pattern."""
    made: pre_tokenizers.PreTokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return made


def of_sentencepiece() -> PreTrainedTokenizerBase:
    """As Gemma's: characters and bytes, merged by the score of the token that they make."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    raw.train_from_iterator(
        _lines(),
        trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=special),
    )
    vocabulary = raw.get_vocab()
    tokens = sorted(set(vocabulary) - set(special), key=lambda token: vocabulary[token])
    pairs = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    made = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=pairs, byte_fallback=True, fuse_unk=True, unk_token="<unk>"
        )
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens([AddedToken(name, special=True) for name in special[:4]])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
