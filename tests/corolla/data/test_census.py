"""Lengths of rows counted by hand, on a tokenizer whose tokens are words."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from corolla.config.run import RunConfig
from corolla.data import census, federated
from corolla.data.census import Census
from corolla.data.encoding import Encoder
from corolla.data.rows import Example
from corolla.errors import DataError

WORDS = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({"?": 0, "</s>": 1, "w": 2}, unk_token="?")),
    eos_token="</s>",
    unk_token="?",
)
WORDS.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
"""A token a word, and one for the end of an answer or a text."""


def words(count: int) -> str:
    return " ".join(["w"] * count)


def counted(rows: list[Example], max_length: int = 8, once: bool = False) -> Census:
    found = Census(Encoder(WORDS, (), max_length), once)
    for number, row in enumerate(rows):
        found.add(row, f"c{number}")
    return found


def test_what_max_length_leaves_of_rows() -> None:
    rows = [
        Example(words(3), prompt=words(4)),  # 4 + 3 + end: fits
        Example(words(6), prompt=words(4)),  # 11: of 7 to be learnt 4 are left
        Example(words(2), prompt=words(9)),  # 12: none of 3
        Example(words(20)),  # 21: three windows, of 20 nothing is lost
        Example(""),  # the end alone has nothing before it: no sequence
    ]
    found = counted(rows).to_json()
    assert found == {
        "max_length": 8,
        "rows": 5,
        "tokens": {"least": 0, "median": 11, "p95": 21, "most": 21},
        "longer": 3,
        "split": 1,
        "cut": 1,
        "dropped": 1,
        "blank": 1,
        "targets": 4 + 4 + 20,
        "targets_lost": 3 + 3,
        "without_target": {"c2": 1, "c4": 1},
    }


def test_where_a_text_is_learnt_from_once_the_rest_is_lost() -> None:
    found = counted([Example(words(20))], once=True).to_json()
    assert (found["cut"], found["split"]) == (1, 0)
    assert (found["targets"], found["targets_lost"]) == (7, 13)


def test_a_quantile_is_the_least_length_that_covers_the_part() -> None:
    found = counted([Example(words(n)) for n in range(1, 101)])  # 2 to 101 tokens
    assert [found.quantile(part) for part in (0.0, 0.01, 0.5, 0.95, 1.0)] == [2, 2, 51, 96, 101]


def data(tmp_path: Path, config: dict[str, object]) -> RunConfig:
    """Two clients: every prompt of the one fills eight tokens, the other has one that does not."""
    path = tmp_path / "x.jsonl"
    rows = [{"client_id": "long", "prompt": words(9), "response": "w"}] * 6
    rows += [{"client_id": "mixed", "prompt": words(9), "response": "w"}] * 5
    rows += [{"client_id": "mixed", "prompt": "w", "response": "w"}] * 5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig.model_validate({"data": str(path), "max_length": 8, **config})


def test_a_client_whose_rows_give_nothing_is_left_out(tmp_path: Path) -> None:
    config = data(tmp_path, {})
    loaded = federated.load(config)
    assert sorted(loaded.clients) == ["long", "mixed"]
    found = census.with_targets(config, loaded, WORDS)
    assert (list(found.clients), found.without) == (["mixed"], ("long",))
    assert found.heldout == loaded.heldout
    longer = data(tmp_path, {"max_length": 16})
    assert census.with_targets(longer, loaded, WORDS) is loaded


def test_under_privacy_of_examples_no_row_decides_whether_a_client_stays(tmp_path: Path) -> None:
    config = data(tmp_path, {"dp": "example", "epsilon": 8, "strategy": "fedavg"})
    loaded = federated.load(config)
    assert census.with_targets(config, loaded, WORDS) is loaded


def test_no_target_at_all_is_refused(tmp_path: Path) -> None:
    config = data(tmp_path, {})
    loaded = federated.load(config)
    alone = replace(loaded, clients={"long": loaded.clients["long"]})
    with pytest.raises(DataError, match="has a target left within max_length=8: raise it"):
        census.with_targets(config, alone, WORDS)


def test_a_sample_is_drawn_by_the_seed_and_says_of_how_many(tmp_path: Path) -> None:
    config = data(tmp_path, {})
    loaded = federated.load(config)
    encoder = Encoder(WORDS, (), 8)
    some = [census.sample(loaded, encoder, seed, most=3) for seed in (0, 0, 1, 2, 3)]
    assert some[0] == some[1]
    assert len({json.dumps(found) for found in some}) > 1
    of = sum(len(split.train) for split in loaded.clients.values())
    assert {(found["rows"], found["of"]) for found in some} == {(3, of)}
    assert f"3 of {of} training rows, a sample: " in census.told(some[0])
    whole = census.sample(loaded, encoder, 0)
    assert census.told(whole).startswith(f"all {of} training rows: 3 to 11 tokens")
    assert "have no target within max-length=8; without a target by client: long (" in (
        census.told(whole)
    )
