"""The benchmark of phones in small: every round is answered in time, whoever vanishes."""

import json
from pathlib import Path

from experiments.bench import phones as bench


def test_forty_phones_of_which_some_vanish_answer_every_round(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    small = "--phones 40 --rounds 5 --seats 24 --vanish 0.2 --deadline 30 --width 64"
    assert bench.main([*small.split(), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    rounds = found["rounds"]
    assert len(rounds) == 5
    assert all(one["error"] == "" for one in rounds)
    assert all(one["seconds"] <= found["options"]["deadline"] for one in rounds)
    assert all(0 < one["updates"] <= 24 for one in rounds)
    assert sum(one["updates"] for one in rounds) >= 5 * 20
    assert sum(one["vanished"] for one in rounds) > 0
    assert max(one["rss"] for one in rounds) < 1.1 * rounds[0]["rss"]


def test_who_vanishes_is_the_same_in_every_run_and_as_many_as_said() -> None:
    one, two = bench._Vanishing(0.2), bench._Vanishing(0.2)
    pairs = [(f"p{i}", r) for i in range(500) for r in range(20)]
    gone = [one.strikes(*pair) for pair in pairs]
    assert gone == [two.strikes(*pair) for pair in pairs]
    assert 0.18 < sum(gone) / len(pairs) < 0.22
