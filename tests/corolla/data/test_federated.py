import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.federated import FederatedData
from corolla.data.rows import Example, counted, read_rows, unit_of
from corolla.errors import ConfigError, DataError

# pyarrow warns about how datasets sorts, flwr-datasets about each attempt of a Dirichlet draw
pytestmark = [
    pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The specified min_partition_size:UserWarning"),
]

Rows = Callable[[Sequence[object]], Path]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    def write(lines: Sequence[object]) -> Path:
        path = tmp_path / "data.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write


def load(path: Path | str, **changes: Any) -> FederatedData:
    return federated.load(RunConfig(data=str(path), **changes))


def numbered(number: int, **extra: Any) -> list[dict[str, Any]]:
    return [{"text": f"row {i}", **extra} for i in range(number)]


def labelled(number: int, labels: str = "abcd") -> list[dict[str, Any]]:
    return [{"text": f"row {i}", "label": labels[i % len(labels)]} for i in range(number)]


def texts(examples: Sequence[Example]) -> set[str]:
    return {example.text for example in examples}


def everything(found: FederatedData) -> list[str]:
    """All examples of a federation whose held-out set is not made of the clients' own."""
    own = [e.text for split in found.clients.values() for e in (*split.train, *split.eval)]
    return own + [e.text for e in found.heldout]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": "a"}, Example("a")),
        ({"text": ""}, Example("")),
        ({"prompt": "q", "response": "a"}, Example("a", prompt="q")),
        ({"text": "a", "label": "good"}, Example("a", label="good")),
        ({"text": "a", "label": 0}, Example("a", label="0")),
        ({"text": "a", "label": None, "client_id": None}, Example("a")),
        ({"text": "a", "client_id": 7}, Example("a", client="7")),
        ({"text": "a", "client_id": 0}, Example("a", client="0")),
        ({"text": "a", "client_id": ""}, Example("a")),
        ({"text": "a", "client_id": " \t\u00a0"}, Example("a")),
        ({"text": "a", "client_id": float("nan")}, Example("a")),
        ({"text": "a", "client_id": " b "}, Example("a", client=" b ")),
        ({"text": "a", "user_id": 12}, Example("a", user="12")),
        ({"text": "a", "user_id": "u", "client_id": "c"}, Example("a", client="c", user="u")),
        ({"text": "a", "user_id": None}, Example("a")),
        ({"text": "a", "user_id": "\n "}, Example("a")),
        ({"text": "a", "user_id": float("nan")}, Example("a")),
        ({"text": "a", "client_id": "../x"}, Example("a", client="../x")),
        ({"text": "a", "split": "train"}, Example("a", split="train")),
        ({"text": "a", "split": "dev"}, Example("a", split="validation")),
        ({"text": "a", "split": "val"}, Example("a", split="validation")),
        ({"text": "a", "split": "test"}, Example("a", split="test")),
        ({"text": "a", "source": {"any": "thing"}}, Example("a")),
        ({"question": "q", "answer": "a"}, Example("a", prompt="q")),
        ({"prompt": "q", "answer": "a"}, Example("a", prompt="q")),
        (
            {"prompt": "q", "choices": ["a", "b"], "answer": 1},
            Example("b", prompt="q", choices=("a", "b")),
        ),
        (
            {"question": "q", "choices": ["a", "b"], "answer": 0, "subject": "x"},
            Example("a", prompt="q", choices=("a", "b")),
        ),
        ({"prompt": "q", "response": "a", "answer": 3, "choices": 4}, Example("a", prompt="q")),
        ({"text": "a", "question": "q", "answer": 3}, Example("a")),
    ],
)
def test_every_form_of_row_is_read(rows: Rows, row: object, wanted: Example) -> None:
    assert read_rows(str(rows([row])))[0] == [wanted]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ('{"text": "a"', "not JSON"),
        ("[1]", "expected an object, found list"),
        ('"text"', "expected an object, found str"),
        ("null", "expected an object"),
        ('{"body": "a"}', "found body"),
        ("{}", "found nothing"),
        ('{"text": 5}', "as strings"),
        ('{"text": null}', "as strings"),
        ('{"prompt": "q"}', "both prompt and response"),
        ('{"question": "q"}', "found question"),
        ('{"question": "q", "answer": 3}', "as strings"),
        ('{"prompt": "q", "choices": ["a"], "answer": 0}', "at least two"),
        ('{"prompt": "q", "choices": "ab", "answer": 0}', "at least two"),
        ('{"prompt": "q", "choices": ["a", ""], "answer": 0}', "not empty"),
        ('{"prompt": "q", "choices": ["a", 1], "answer": 0}', "must be strings"),
        ('{"prompt": "q", "choices": ["a", "b"], "answer": 2}', "0 to 1, found 2"),
        ('{"prompt": "q", "choices": ["a", "b"], "answer": -1}', "0 to 1, found -1"),
        ('{"prompt": "q", "choices": ["a", "b"], "answer": true}', "0 to 1, found True"),
        ('{"prompt": "q", "choices": ["a", "b"], "answer": "b"}', "0 to 1, found 'b'"),
        ('{"response": "a"}', "both prompt and response"),
        ('{"prompt": 1, "response": "a"}', "as strings"),
        ('{"prompt": null, "response": "a"}', "as strings"),
        ('{"prompt": "q", "response": "a", "text": "t"}', "both prompt and response"),
        ('{"text": "a", "split": "other"}', "unknown split 'other'"),
        ('{"text": "a", "split": ["train"]}', "split"),
        ('{"text": "half a pair: \\ud800"}', "text"),
        ('{"text": "a", "client_id": "\\ud800"}', "client_id"),
        ('{"text": "a", "user_id": "\\ud800"}', "user_id"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(rows: Rows, line: str, reason: str) -> None:
    path = rows([{"text": "a"}, "", line, {"text": "b"}])
    with pytest.raises(DataError, match="line 3: ") as caught:
        read_rows(str(path))
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="line 2"):
        read_rows(str(path))


def test_unicode_and_line_ends_of_windows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"text": "日本\\u2028 é"}\r\n\r\n{"text": "b\u2028c"}'.encode())
    assert [row.text for row in read_rows(str(path))[0]] == ["日本\u2028 é", "b\u2028c"]


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        read_rows(str(path))


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="no file in it ends in"):
        read_rows(str(tmp_path))


def test_a_name_that_is_nowhere_is_said_in_one_line() -> None:
    with pytest.raises(DataError, match="neither a file here nor on the hub") as caught:
        read_rows("corolla-tests/does-not-exist")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b"}], "1 of 2 rows have a label"),
        ([{"prompt": "q", "response": "a", "label": "x"}], "use text and label"),
    ],
)
def test_mixed_kinds_of_rows_are_refused(rows: Rows, lines: list[object], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load(rows(lines))


def test_the_fingerprint_is_of_the_content(rows: Rows) -> None:
    first = read_rows(str(rows([{"text": "a"}])))[1]
    second = read_rows(str(rows([{"text": "b"}])))[1]
    assert first == read_rows(str(rows([{"text": "a"}])))[1] != second
    assert len(first) == 64


def test_labels_are_sorted_and_complete(rows: Rows) -> None:
    found = load(rows(labelled(40, "cab")), clients=2)
    assert found.labels == ["a", "b", "c"]
    assert load(rows(numbered(40)), clients=2).labels == []


def test_splits_are_honoured(rows: Rows) -> None:
    lines = [
        {"text": f"{client} {split} {i}", "client_id": client, "split": split}
        for client in ("ada", "ben")
        for split, number in (("train", 8), ("validation", 3), ("test", 2))
        for i in range(number)
    ]
    found = load(rows(lines))
    for client, split in found.clients.items():
        assert texts(split.train) == {f"{client} train {i}" for i in range(8)}
        assert texts(split.eval) == {f"{client} validation {i}" for i in range(3)}
    assert texts(found.heldout) == {f"{c} test {i}" for c in ("ada", "ben") for i in range(2)}


@pytest.mark.parametrize("partition", ["natural", "iid"])
def test_a_missing_split_is_carved_from_training_alone(rows: Rows, partition: str) -> None:
    lines = [{"text": f"t{i}", "client_id": "ada", "split": "train"} for i in range(30)]
    lines += [{"text": f"x{i}", "client_id": "ada", "split": "test"} for i in range(4)]
    clients = 2 if partition == "iid" else None
    found = load(rows(lines), partition=partition, clients=clients)
    assert texts(found.heldout) == {f"x{i}" for i in range(4)}
    for split in found.clients.values():
        assert len(split.eval) >= 1
        assert texts(split.train) | texts(split.eval) <= {f"t{i}" for i in range(30)}
    assert sorted(everything(found)) == sorted(str(line["text"]) for line in lines)


def test_own_validation_rows_serve_where_nothing_is_held_out(rows: Rows) -> None:
    lines = [{"text": f"t{i}", "client_id": "ada", "split": "train"} for i in range(5)]
    lines += [{"text": "v", "client_id": "ada", "split": "validation"}]
    found = load(rows(lines))
    assert texts(found.heldout) == texts(found.clients["ada"].eval) == {"v"}
    assert len(found.clients["ada"].train) == 5


def test_natural_clients_are_those_of_the_rows(rows: Rows) -> None:
    lines = [{"text": f"{c}{i}", "client_id": c} for c in ("zoe", "ada") for i in range(20)]
    found = load(rows(lines))
    assert list(found.clients) == ["ada", "zoe"]
    for client, split in found.clients.items():
        # 20 rows: 2 held out globally, then 2 of the client's own
        assert (len(split.train), len(split.eval)) == (16, 2)
        assert all(e.text.startswith(client) for e in (*split.train, *split.eval))
    assert len(found.heldout) == 4


def test_natural_clients_are_chosen_by_the_seed(rows: Rows) -> None:
    lines = [{"text": f"{c} {i}", "client_id": f"c{c}"} for c in range(20) for i in range(6)]
    path = rows(lines)
    chosen = [tuple(load(path, clients=5, seed=seed).clients) for seed in range(6)]
    assert all(len(clients) == 5 for clients in chosen)
    assert len(set(chosen)) > 3
    assert tuple(load(path, clients=5, seed=2).clients) == chosen[2]


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.5])
def test_as_many_clients_as_asked_or_none(rows: Rows, fraction: float) -> None:
    """Clients too small to train are not chosen in the place of others."""
    lines = [{"text": f"s{c} {i}", "client_id": f"small{c}"} for c in range(9) for i in range(4)]
    lines += [{"text": f"b{c} {i}", "client_id": f"big{c}"} for c in range(3) for i in range(20)]
    found = load(rows(lines), clients=3, eval_fraction=fraction)
    assert len(found.clients) == 3


def test_natural_needs_client_ids(rows: Rows) -> None:
    with pytest.raises(DataError, match="needs client_id in every row"):
        load(rows(numbered(20)), partition="natural")


NOBODY: list[dict[str, Any]] = [
    {},
    {"client_id": None},
    {"client_id": ""},
    {"client_id": "  "},
    {"client_id": float("nan")},
]


@pytest.mark.parametrize("nobody", NOBODY)
@pytest.mark.parametrize("partition", ["auto", "natural"])
def test_rows_of_nobody_among_those_of_clients_are_refused(
    rows: Rows, nobody: dict[str, Any], partition: str
) -> None:
    """The first of them is named by its line, empty ones counted."""
    own = numbered(79, client_id="c0")
    path = rows([*own[:40], "", {"text": "x", **nobody}, *own[40:], {"text": "y", **nobody}])
    with pytest.raises(DataError) as caught:
        load(path, partition=partition)
    assert str(caught.value) == (
        f"{path}: 2 of 81 rows have no client_id, the first is line 42; all or none must, or "
        f"--set partition=iid deals all rows out at random"
    )


def test_at_random_rows_are_dealt_out_whoever_they_are_of(rows: Rows) -> None:
    path = rows([*numbered(79, client_id="c0"), {"text": "x"}])
    found = load(path, partition="iid", clients=4)
    assert sorted(found.clients) == [f"client-{i}" for i in range(4)]
    assert len(everything(found)) == 80


@pytest.mark.parametrize("nobody", NOBODY)
@pytest.mark.parametrize("split", [{}, {"split": "test"}])
def test_held_out_rows_and_those_of_a_device_all_name_a_client_or_none_does(
    rows: Rows, nobody: dict[str, Any], split: dict[str, str]
) -> None:
    path = rows([{"text": "x", **nobody}, *numbered(79, client_id="c0", **split)])
    why = "1 of 80 rows have no client_id, the first is line 1; all or none must$"
    with pytest.raises(DataError, match=why):
        heldout(path)
    plain: dict[str, Any] = {}
    for private in (plain, *PRIVATE):
        with pytest.raises(DataError, match=why):
            private_device(path, **private)
    nobodys = rows([{**row, **nobody} for row in numbered(20)])
    assert len(heldout(nobodys).heldout) == 20


@pytest.mark.parametrize("nobody", [None, "", " ", float("nan")])
@pytest.mark.parametrize("partition", ["natural", "iid"])
def test_with_dp_of_examples_all_rows_name_a_user_or_none_does(
    rows: Rows, nobody: object, partition: str
) -> None:
    """However they are dealt out: one row would decide what is protected. Else it has no effect."""
    own = [{**row, "user_id": f"u{i % 5}"} for i, row in enumerate(numbered(79, client_id="c"))]
    path = rows([*own, {"text": "x", "client_id": "c", "user_id": nobody}])
    private: dict[str, Any] = {"dp": "example", "noise_multiplier": 1.0}
    why = "1 of 80 rows have no user_id, the first is line 80; all or none must$"
    with pytest.raises(DataError, match=why):
        load(path, partition=partition, **private)
    with pytest.raises(DataError, match=why):
        private_device(path, **private)
    assert load(path, partition=partition).clients.keys() == (
        load(rows(own), partition=partition).clients.keys()
    )


def test_what_a_client_counts_in(rows: Rows) -> None:
    own = [{**row, "user_id": f"u{i % 5}"} for i, row in enumerate(numbered(30, client_id="c"))]
    found = load(rows(own)).clients["c"].train
    assert (unit_of(found), unit_of([Example("a")]), unit_of([])) == ("user", "example", "example")
    assert [counted(dp, found) for dp in ("none", "client", "example")] == [24, 24, 5]
    assert counted("example", [Example("a"), Example("a")]) == 2


def test_of_a_hub_the_row_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines are of no file; the fingerprint is that of the rows' content alone."""
    table: list[dict[str, Any]] = [
        {"text": "a", "client_id": "c"},
        {"text": "b", "client_id": None},
    ]
    monkeypatch.setattr("datasets.load_dataset", lambda name: {"train": table})
    with pytest.raises(DataError, match="1 of 2 rows have no client_id, the first is row 2"):
        load("some/set")
    content = [
        {
            "text": row["text"],
            "prompt": None,
            "label": None,
            "client": row["client_id"],
            "split": "train",
            "choices": [],
        }
        for row in table
    ]
    wanted = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert read_rows("some/set")[1] == wanted


def test_too_many_clients_are_refused(rows: Rows) -> None:
    lines = [{"text": f"{c} {i}", "client_id": f"c{c}"} for c in range(3) for i in range(6)]
    with pytest.raises(ConfigError, match=r"asked for 4 clients, .* has 3 with"):
        load(rows(lines), clients=4)
    with pytest.raises(ConfigError, match=r"asked for 10 clients, .* has 18 training rows"):
        load(rows(lines), clients=10, partition="iid")


def test_no_client_left_is_said(rows: Rows) -> None:
    lines = [{"text": f"{c}", "client_id": f"c{c}"} for c in range(3)]
    with pytest.raises(DataError, match="no clients left of 3"):
        load(rows(lines))
    lines = [{"text": f"{i}", "client_id": "a"} for i in range(10)]
    with pytest.raises(DataError, match="min_examples=50"):
        load(rows(lines), min_examples=50)


def test_small_clients_are_left_out(rows: Rows) -> None:
    lines = [{"text": f"{i}", "client_id": "big"} for i in range(10)]
    lines += [{"text": "alone", "client_id": "small"}]
    assert list(load(rows(lines)).clients) == ["big"]


PARTITIONS = ["iid", "dirichlet", "shards", "linear", "square", "exponential"]


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_partition_is_disjoint_complete_and_reproducible(rows: Rows, partition: str) -> None:
    path = rows(labelled(240))
    found = load(path, partition=partition, clients=4, seed=3)
    assert list(found.clients) == ["client-0", "client-1", "client-2", "client-3"]
    assert sorted(everything(found)) == sorted(f"row {i}" for i in range(240))
    again = load(path, partition=partition, clients=4, seed=3)
    assert again == found
    assert load(path, partition=partition, clients=4, seed=4).clients != found.clients


def sizes(found: FederatedData) -> list[int]:
    """Rows of each client before the global held-out set is taken away."""
    return [len(split.train) + len(split.eval) for split in found.clients.values()]


def test_sizes_follow_the_name_of_the_partition(rows: Rows) -> None:
    path = rows(numbered(1000))

    def of(partition: str) -> list[int]:
        # one row in a hundred is held out of each client: sizes hardly change
        return sizes(load(path, partition=partition, clients=4, eval_fraction=0.01))

    assert of("iid") == [248] * 4  # 250 each, 2 held out
    assert of("linear") == pytest.approx([100, 200, 300, 400], abs=10)
    assert of("square") == pytest.approx([1000 * i * i / 30 for i in (1, 2, 3, 4)], abs=15)
    exponential = of("exponential")
    ratios = [b / a for a, b in itertools.pairwise(exponential)]
    assert ratios == pytest.approx([2.718] * 3, rel=0.1)


def test_shards_and_dirichlet_give_clients_few_labels(rows: Rows) -> None:
    def purity(**changes: Any) -> float:
        found = load(rows(labelled(400)), clients=4, **changes)
        shares = []
        for split in found.clients.values():
            labels = [e.label for e in split.train]
            shares.append(max(labels.count(label) for label in set(labels)) / len(labels))
        return sum(shares) / 4

    assert purity(partition="iid") < 0.4
    assert purity(partition="shards", shards_per_client=1) > 0.95
    assert purity(partition="dirichlet", partition_alpha=0.1) > 0.5
    assert purity(partition="dirichlet", partition_alpha=1000.0) < 0.4


@pytest.mark.parametrize("partition", ["dirichlet", "shards"])
def test_partitions_by_label_need_labels(rows: Rows, partition: str) -> None:
    with pytest.raises(ConfigError, match="needs labels"):
        load(rows(numbered(100)), partition=partition)


@pytest.mark.parametrize("partition", ["dirichlet", "shards", "exponential"])
def test_a_partition_that_cannot_be_made_is_said(rows: Rows, partition: str) -> None:
    changes = {"shards_per_client": 50} if partition == "shards" else {}
    number = 90 if partition == "dirichlet" else 25
    with pytest.raises((ConfigError, DataError)) as caught:
        load(rows(labelled(120)), partition=partition, clients=number, min_examples=2, **changes)
    assert "\n" not in str(caught.value)


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ada", "ben", "cyd"]),
            st.sampled_from(["", "train", "validation", "test"]),
        ),
        min_size=1,
        max_size=40,
    ),
    st.floats(0.01, 0.99),
    st.sampled_from(["natural", "iid"]),
    st.integers(1, 4),
)
def test_nobody_trains_on_what_is_held_out(
    rows: Rows, kinds: list[tuple[str, str]], fraction: float, partition: str, least: int
) -> None:
    lines = [
        {"text": f"{i}", "client_id": client, "split": split}
        for i, (client, split) in enumerate(kinds)
    ]
    clients = 2 if partition == "iid" else None
    path = rows(lines)
    try:
        found = load(
            path, eval_fraction=fraction, partition=partition, clients=clients, min_examples=least
        )
    except (ConfigError, DataError):
        return
    trained = [e.text for split in found.clients.values() for e in split.train]
    held = texts(found.heldout) | {e.text for split in found.clients.values() for e in split.eval}
    assert len(trained) == len(set(trained))
    assert not set(trained) & held
    assert not set(trained) & {
        str(i) for i, (_, s) in enumerate(kinds) if s in ("test", "validation")
    }
    assert found.heldout
    assert all(len(split.train) >= least for split in found.clients.values())
    assert set(trained) | held <= {str(i) for i in range(len(kinds))}


def test_the_embedded_data_set_loads() -> None:
    found = load("embedded")
    assert len(found.clients) > 10
    assert found.labels == []
    assert all(len(split.train) >= 2 for split in found.clients.values())
    trained = {(e.prompt, e.text) for s in found.clients.values() for e in s.train}
    assert len(trained) > 500
    assert len(found.heldout) > 100
    assert all(e.prompt for e in found.heldout)
    leaked = [e.prompt for e in found.heldout if (e.prompt, e.text) in trained]
    assert leaked == []


def test_rows_with_and_without_choices_do_not_mix(rows: Rows) -> None:
    both = [{"prompt": "q", "response": "a"}, {"prompt": "q", "choices": ["a", "b"], "answer": 0}]
    with pytest.raises(DataError, match="1 of 2 rows have choices"):
        load(rows(both))


def device(path: Path | str, name: str, labels: Sequence[str] = (), **changes: Any) -> Any:
    return federated.load_device(RunConfig(data=str(path), **changes), name, labels)


@pytest.mark.parametrize("splits", [(None,), ("train", "test"), ("train", "validation", "test")])
def test_a_device_trains_on_what_its_simulated_client_does(
    rows: Rows, tmp_path: Path, splits: Sequence[str | None]
) -> None:
    names = ["ada", "ben", "cyd"]
    every = [
        {
            "text": f"{names[i % 3]} {i}",
            "client_id": names[i % 3],
            "split": splits[i // 3 % len(splits)],
        }
        for i in range(90)
    ]
    whole = load(rows(every), seed=4)
    for name in names:
        own = tmp_path / f"{name}.jsonl"
        lines = [json.dumps(row) for row in every if row["client_id"] == name]
        own.write_text("\n".join(lines))
        found = device(own, name, seed=4)
        assert found.clients.keys() == {name}
        assert found.clients[name] == whole.clients[name]


def test_all_rows_of_a_device_are_its_own(rows: Rows) -> None:
    path = rows([{"text": f"{i}", "client_id": f"c{i % 3}"} for i in range(12)])
    found = device(path, "phone")
    # a tenth, at least one, is held out of 12, then of 11, as for any client
    assert (len(found.clients["phone"].train), len(found.clients["phone"].eval)) == (10, 1)


def test_of_embedded_data_a_device_is_one_client() -> None:
    config = RunConfig(seed=3)
    assert device("embedded", "pdb", seed=3).clients["pdb"] == federated.load(config).clients["pdb"]
    with pytest.raises(DataError, match="no client 'nobody': it has asyncio, bdb"):
        device("embedded", "nobody")


def test_labels_of_a_device_are_those_of_the_run(rows: Rows) -> None:
    path = rows(labelled(8, "ab"))
    assert device(path, "p", ["a", "b", "c"]).labels == ["a", "b", "c"]
    assert device(path, "p").labels == []  # a run on text
    with pytest.raises(DataError) as caught:
        device(path, "p", ["a", "c"])
    assert str(caught.value) == "4 of 8 rows have no label of this run's 2"
    with pytest.raises(DataError, match="8 of 8 rows have no label"):
        device(rows(numbered(8)), "p", ["a", "c"])


PRIVATE: list[dict[str, Any]] = [
    {"dp": "example", "noise_multiplier": 1.0},
    {"limited": True},
]


def private_device(path: Path, labels: Sequence[str] = (), **given: Any) -> FederatedData:
    limited = given.pop("limited", False)
    return federated.load_device(RunConfig(data=str(path), **given), "p", labels, limited)


@pytest.mark.parametrize("private", PRIVATE)
def test_under_privacy_one_row_less_is_one_example_less(
    rows: Rows, private: dict[str, Any]
) -> None:
    """Whatever the others are, and with the same seed: nothing is carved for evaluation."""
    every = numbered(20)
    whole = private_device(rows(every), **private).clients["p"]
    assert (texts(whole.train), whole.eval) == ({row["text"] for row in every}, ())
    for left_out in (0, 7, 19):
        fewer = private_device(rows(every[:left_out] + every[left_out + 1 :]), **private)
        assert texts(whole.train) - texts(fewer.clients["p"].train) == {f"row {left_out}"}
        assert len(fewer.clients["p"].train) == 19


@pytest.mark.parametrize("private", PRIVATE)
def test_under_privacy_a_rows_own_split_decides_of_that_row_alone(
    rows: Rows, private: dict[str, Any]
) -> None:
    marked = [{"text": split, "split": split} for split in ("train", "test", "validation", "dev")]
    for others in ([], marked[1:2], marked[1:]):
        path = rows([marked[0], *others, *numbered(4)])
        found = private_device(path, **private).clients["p"]
        assert texts(found.train) == {"train", *(f"row {i}" for i in range(4))}


@pytest.mark.parametrize("private", PRIVATE)
@pytest.mark.parametrize("labels", [["a", "b"], ["a", "c"], ["x", "y"]])
def test_under_privacy_a_row_with_another_label_stays_without_a_target(
    rows: Rows, private: dict[str, Any], labels: Sequence[str]
) -> None:
    found = private_device(rows(labelled(8, "ab")), labels, **private)
    wanted = [(f"row {i}", "ab"[i % 2] if "ab"[i % 2] in labels else None) for i in range(8)]
    assert [(e.text, e.label) for e in found.clients["p"].train] == wanted
    unlabelled = private_device(rows(numbered(8)), labels, **private)
    assert [e.label for e in unlabelled.clients["p"].train] == [None] * 8


def test_a_device_with_too_little_is_told(rows: Rows) -> None:
    with pytest.raises(DataError, match="1 of 1 rows are left to train on, the run asks for min"):
        device(rows(numbered(1)), "p")
    assert len(device(rows(numbered(1)), "p", min_examples=1).clients["p"].train) == 1


@pytest.mark.parametrize("private", PRIVATE)
def test_no_number_of_rows_of_users_decides_a_refusal(rows: Rows, private: dict[str, Any]) -> None:
    """A server could find it out by min_examples; of users it is told how many there are."""
    for many in (1, 30):
        owners = [{"text": f"{i}", "user_id": "a"} for i in range(many)]
        path = rows([*owners, {"text": "x", "user_id": "b"}])
        assert len(private_device(path, min_examples=2, **private).clients["p"].train) == many + 1
        with pytest.raises(DataError, match=r"^2 (of 2 rows|users) are left to train on"):
            private_device(path, min_examples=3, **private)


def test_a_simulation_leaves_out_clients_with_few_users(rows: Rows) -> None:
    lines = [
        {"text": f"{c} {i}", "client_id": c, "user_id": f"u{i % users}", "split": "train"}
        for c, users in (("ada", 1), ("ben", 4))
        for i in range(8)
    ]
    path = rows([*lines, {**lines[0], "split": "test"}])
    for private, wanted in (({}, {"ada", "ben"}), (PRIVATE[0], {"ben"})):
        assert load(path, min_examples=4, **private).clients.keys() == wanted


def heldout(path: Path | str, **changes: Any) -> FederatedData:
    return federated.load_heldout(RunConfig(data=str(path), **changes))


def test_a_server_measures_on_what_a_simulation_holds_out(rows: Rows) -> None:
    natural = rows([{"text": f"{i}", "client_id": f"c{i % 3}"} for i in range(60)])
    for path in (natural, "embedded"):
        found = heldout(path, seed=2)
        assert found.heldout == load(path, seed=2).heldout
        assert found.clients == {}
        assert found.fingerprint == load(path).fingerprint


def test_of_a_servers_file_test_rows_count_else_validation_else_all(rows: Rows) -> None:
    def split(*names: str) -> Path:
        return rows([{"text": f"{n} {i}", "split": n} for i in range(4) for n in names])

    assert texts(heldout(split("train", "validation", "test")).heldout) == {
        f"test {i}" for i in range(4)
    }
    assert texts(heldout(split("train", "valid")).heldout) == {f"valid {i}" for i in range(4)}
    assert len(heldout(rows(numbered(7))).heldout) == 7
    assert len(heldout(split("train")).heldout) == 4


def test_labels_of_a_run_are_those_of_the_servers_file(rows: Rows) -> None:
    path = rows([{**row, "split": "test"} for row in labelled(4, "ba")] + labelled(2, "c"))
    assert heldout(path).labels == ["a", "b", "c"]
    assert heldout(path, task="causal").labels == []
    assert len(heldout(path).heldout) == 4
