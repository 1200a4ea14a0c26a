import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from corolla.data.encoding import IGNORE, Encoded, Encoder, collate
from corolla.data.rows import Example
from corolla.errors import DataError

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def plain(special: bool = False) -> transformers.PreTrainedTokenizerBase:
    """One token a byte; <eos> is 0 and pads too. `special`: <bos> before and <eos> after."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(["<eos>", "<bos>", *alphabet])}, merges=[]
        )
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    if special:
        raw.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 0)]
        )
    made: transformers.PreTrainedTokenizerBase = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", bos_token="<bos>"
    )
    return made


PLAIN, SPECIAL, CHAT = plain(), plain(special=True), plain()
CHAT.chat_template = TEMPLATE


def said(sequence: Encoded) -> str:
    """What is learnt: the text of the targets."""
    assert not isinstance(sequence.labels, int)
    return str(PLAIN.decode([label for label in sequence.labels if label != IGNORE]))


def read(sequence: Encoded) -> str:
    return str(PLAIN.decode(sequence.input_ids))


@given(st.integers(1, 60), st.integers(2, 20))
def test_windows_of_a_long_text_lose_nothing(size: int, length: int) -> None:
    """Every byte of a text without repetitions is read, in order, and so is its end."""
    text = "".join(chr(33 + i) for i in range(size))
    windows = Encoder(PLAIN, [], length)(Example(text))
    assert all(len(window.input_ids) <= length for window in windows)
    assert all(window.labels == window.input_ids for window in windows)
    found = dict.fromkeys(i for window in windows for i in window.input_ids)
    assert list(found) == [*PLAIN(text)["input_ids"], 0]


def test_an_empty_text_gives_nothing() -> None:
    assert Encoder(PLAIN, [], 10)(Example("")) == []


def test_a_prompt_is_masked_and_the_response_ends() -> None:
    (found,) = Encoder(PLAIN, [], 50)(Example("yes", prompt="is it?"))
    assert read(found) == "is it?\nyes<eos>"
    assert said(found) == "yes<eos>"
    assert found.labels[:7] == [IGNORE] * 7  # type: ignore[index]
    assert found.targets == 4


def test_a_prompt_is_masked_by_position() -> None:
    """Also where prompt and response are the same tokens, and where the prompt holds <eos>."""
    (found,) = Encoder(PLAIN, [], 50)(Example("ab", prompt="ab<eos>ab"))
    assert said(found) == "ab<eos>"
    assert found.input_ids.count(0) == 2


def test_special_tokens_stand_at_the_ends_only() -> None:
    (found,) = Encoder(SPECIAL, [], 50)(Example("yes", prompt="is it?"))
    assert read(found) == "<bos>is it?\nyes<eos>"
    assert said(found) == "yes<eos>"
    (text,) = Encoder(SPECIAL, [], 50)(Example("yes"))
    assert read(text) == "<bos>yes<eos>"


def test_a_chat_template_is_used_and_masked() -> None:
    (found,) = Encoder(CHAT, [], 80)(Example("yes", prompt="is it?"))
    assert read(found) == "[user]is it?\n[assistant]yes\n<eos>"
    assert said(found) == "yes\n<eos>"


def test_a_template_that_ends_with_eos_gets_no_second_one() -> None:
    tokenizer = plain()
    tokenizer.chat_template = (
        "{% for m in messages %}<bos>{{ m['role'][0] }}{{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<bos>a{% endif %}"
    )
    (found,) = Encoder(tokenizer, [], 80)(Example("yes", prompt="is it?"))
    assert read(found) == "<bos>uis it?<eos><bos>ayes<eos>"
    assert said(found) == "yes<eos>"


@pytest.mark.parametrize("tokenizer", [PLAIN, SPECIAL, CHAT], ids=["plain", "special", "chat"])
def test_a_model_is_asked_with_the_prompt_it_was_trained_on(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    encoder = Encoder(tokenizer, [], 80)
    (found,) = encoder(Example("yes", prompt="is it?"))
    asked = encoder.prompt_ids(Example("", prompt="is it?"))
    assert list(found.input_ids[: len(asked)]) == asked
    assert list(found.labels[: len(asked)]) == [IGNORE] * len(asked)  # type: ignore[index]
    assert found.labels[len(asked)] != IGNORE  # type: ignore[index]


@pytest.mark.parametrize(
    ("length", "learnt"),
    [(11, "yes<eos>"), (10, "yes"), (9, "ye"), (8, "y"), (7, None), (3, None)],
)
def test_a_response_is_cut_at_the_end(length: int, learnt: str | None) -> None:
    found = Encoder(PLAIN, [], length)(Example("yes", prompt="is it?"))
    assert [said(sequence) for sequence in found] == ([learnt] if learnt else [])
    assert all(len(sequence.input_ids) <= length for sequence in found)


def test_an_empty_response_teaches_to_stop() -> None:
    (found,) = Encoder(PLAIN, [], 50)(Example("", prompt="x"))
    assert said(found) == "<eos>"


def test_a_label_becomes_a_class() -> None:
    encoder = Encoder(PLAIN, ["no", "perhaps", "yes"], 4)
    (found,) = encoder(Example("abcdefgh", label="perhaps"))
    assert (read(found), found.labels, found.targets) == ("abcd", 1, 1)
    with pytest.raises(DataError, match="label"):
        encoder(Example("abc", label="other"))
    assert encoder(Example("abc")) == []


def test_targets_leave_out_the_first_position() -> None:
    assert Encoded([5, 6, 7], [5, 6, 7]).targets == 2
    assert Encoded([5, 6, 7], [5, IGNORE, IGNORE]).targets == 0
    assert Encoded([5, 6, 7], [IGNORE, IGNORE, 7]).targets == 1


def test_a_batch_is_padded_on_the_right_and_masked_there() -> None:
    batch = collate([Encoded([5, 6, 0], [IGNORE, 6, 0]), Encoded([7], [7])], 0, CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    # pad is eos here: the eos that is said is learnt, padding is not
    assert batch["labels"].tolist() == [[-100, 6, 0], [7, -100, -100]]


def test_a_batch_of_classes_has_one_label_a_row() -> None:
    batch = collate([Encoded([5, 6], 2), Encoded([7], 0)], 9, CPU)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert batch["labels"].tolist() == [2, 0]
