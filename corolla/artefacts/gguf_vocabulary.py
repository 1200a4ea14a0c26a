"""A tokenizer of transformers as llama.cpp reads it: tokens, merges, and how text is cut first.

llama.cpp has no tokenizer files of its own: what it cannot do, or what is not known to be the same
there, is refused by name.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from corolla.errors import ArtefactError

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PIECES = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_LETTERS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_LETTERS + r"\p{N}" + _REST,): "qwen2",
}
"""The steps that cut a text before its bytes are merged → their name in llama.cpp."""
_WHOLE_WORDS = {"llama-bpe"}
"""Names for which llama.cpp takes a piece that is a token as it is (`ignore_merges`)."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model in the order of their ids, with what merges them."""

    model: str
    """llama (SentencePiece) or gpt2 (bytes)."""
    tokens: Sequence[str]
    types: Sequence[TokenType]
    pre: str = ""
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    space_first: bool = False

    def add_to(self, writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the vocabulary, the special tokens of `tokenizer` and its chat template."""
        writer.add_tokenizer_model(self.model)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.model == "gpt2":
            writer.add_tokenizer_pre(self.pre)
            writer.add_token_merges(list(self.merges))
        else:
            writer.add_tokenizer_pre("default")
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.space_first)
        add = {
            "bos_token_id": writer.add_bos_token_id,
            "eos_token_id": writer.add_eos_token_id,
            "unk_token_id": writer.add_unk_token_id,
            "pad_token_id": writer.add_pad_token_id,
        }
        for name, write in add.items():
            if (token := getattr(tokenizer, name)) is not None:
                write(int(token))
        ids = list(tokenizer("a")["input_ids"])
        writer.add_add_bos_token(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
        writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
        if isinstance(template := tokenizer.chat_template, str):
            writer.add_chat_template(template)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer for a model of `size` embeddings.

    Raises ArtefactError for one that llama.cpp would cut otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ArtefactError(f"{type(tokenizer).__name__} has no tokenizer.json: it cannot be read")
    described: dict[str, Any] = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ArtefactError(f"--to gguf writes tokenizers of type BPE, found {model['type']}")
    tokens, types = _tokens(described, size)
    if _steps(described["pre_tokenizer"])[-1:] and _last(described) == "ByteLevel":
        pre = _cut(described)
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return Vocabulary("gpt2", tokens, types, pre, merges)
    return _sentencepiece(described, tokens, types)


def _tokens(described: Mapping[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Tokens and their types by id; ids without a token are unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    known = {i: token for token, i in described["model"]["vocab"].items()}
    known |= {i: entry["content"] for i, entry in added.items()}
    if known and max(known) >= size:
        raise ArtefactError(
            f"the tokenizer has ids up to {max(known)}, the model {size} embeddings: they are not "
            f"of one model"
        )
    unknown = described["model"].get("unk_token")
    for i, token in known.items():
        tokens[i] = token
        if i in added:
            types[i] = TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
            if token == unknown:
                types[i] = TokenType.UNKNOWN
        else:
            is_byte = described["model"].get("byte_fallback") and _is_byte(token)
            types[i] = TokenType.BYTE if is_byte else TokenType.NORMAL
    return tokens, types


def _cut(described: Mapping[str, Any]) -> str:
    """The name of what cuts a text into pieces of bytes. Raises ArtefactError without one."""
    pieces: list[str] = []
    for step in _steps(described["pre_tokenizer"]):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            pieces += ["bytes"] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            pieces.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pieces.append(step["pattern"].get("Regex", ""))
        else:
            pieces.append(step["type"])
    normalizer = (described["normalizer"] or {"type": "none"})["type"]
    whole = bool(described["model"]["ignore_merges"])
    if not described["model"]["merges"]:  # each byte is a token, wherever a text is cut
        return "gpt-2"
    name = _PIECES.get(tuple(pieces), "")
    if not name or normalizer not in ("none", "NFC") or whole != (name in _WHOLE_WORDS):
        raise ArtefactError(
            f"llama.cpp may cut texts otherwise than this tokenizer (pre_tokenizer "
            f"{json.dumps(described['pre_tokenizer'])[:120]}, normalizer {normalizer}): "
            f"--to gguf knows those of GPT-2, SmolLM, Llama 3 and Qwen 2"
        )
    return name


def _sentencepiece(
    described: Mapping[str, Any], tokens: list[str], types: list[TokenType]
) -> Vocabulary:
    """A vocabulary that was made by SentencePiece: a token's score says when it is merged.

    Raises ArtefactError for merges that no scores stand for.
    """
    model = described["model"]
    before = [s["type"] for s in _steps(described["normalizer"])]
    cuts = [s for s in _steps(described["pre_tokenizer"]) if s.get("pattern") != {"String": " "}]
    if (
        not model.get("byte_fallback")
        or before not in (["Replace"], ["Prepend", "Replace"])
        or cuts
    ):
        raise ArtefactError(
            f"llama.cpp may cut texts otherwise than this tokenizer (normalizer "
            f"{before or 'none'}, byte_fallback {bool(model.get('byte_fallback'))}): "
            f"--to gguf knows those of SentencePiece and of bytes"
        )
    pairs = [p.split(" ") if isinstance(p, str) else p for p in model["merges"]]
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, i)
    listed = {(left, right) for left, right in pairs}
    vocabulary = model["vocab"]
    for token in rank:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in listed:
                raise ArtefactError(
                    f"the tokenizer never merges {pair[0]!r} and {pair[1]!r}, llama.cpp would: "
                    f"--to gguf knows merges as SentencePiece makes them"
                )
    lowest = -float(len(pairs) + 1)
    scores = [-float(rank[token]) if token in rank else lowest for token in tokens]
    for i, kind in enumerate(types):
        if kind is not TokenType.NORMAL:
            scores[i] = 0.0
    return Vocabulary("llama", tokens, types, scores=scores, space_first="Prepend" in before)


def _steps(described: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a normalizer or a pre-tokenizer, in order."""
    if described is None:
        return []
    for parts in ("pretokenizers", "normalizers"):
        if parts in described:
            return [step for part in described[parts] for step in _steps(part)]
    return [dict(described)]


def _last(described: Mapping[str, Any]) -> str:
    return str(_steps(described["pre_tokenizer"])[-1]["type"])


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
