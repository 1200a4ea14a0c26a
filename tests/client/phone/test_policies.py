"""What a device decides for itself, by the table that the native client is held to as well."""

import json
from pathlib import Path
from typing import Any

import pytest

from corolla.client.phone import policies
from corolla.client.phone.policies import Entry, Limits, Spent
from corolla.proto import device_pb2 as pb

TABLE: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent.parent / "policy_cases.json").read_text()
)
NOW = float(TABLE["now"])


@pytest.mark.parametrize("case", TABLE["cases"], ids=lambda case: str(case["name"]))
def test_what_a_device_decides(case: dict[str, Any], tmp_path: Path) -> None:
    lines = [own if isinstance(own, str) else json.dumps(own) for own in case["history"]]
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + "\n")
    history = policies.read(tmp_path / "history.jsonl", NOW)
    asked: dict[str, Any] = {
        k: float(v) if isinstance(v, str) else v  # "nan"
        for k, v in case["policy"].items()
    }
    policy = policies.stricter(pb.Policy(**asked), Limits(**case["owner"]))
    device, spent = case["device"], case["session"]
    found = {
        "start": policies.before_check_in(policy, device, case["examples"], history, NOW),
        "lease": policies.with_lease(policy, history, case["run"], case["round"], NOW),
        "working": policies.while_training(policy, device, history, NOW, Spent(**spent)),
    }
    assert found == case["expected"]


def test_the_table_has_a_case_of_everything_that_can_be_asked() -> None:
    asked = {name for case in TABLE["cases"] for name in case["policy"]}
    assert asked == {field.name for field in pb.Policy.DESCRIPTOR.fields}
    named = {name for case in TABLE["cases"] for of in case["expected"].values() for name in of}
    assert named == policies._WORDS.keys()


def test_a_history_is_written_line_by_line_and_forgets_what_is_old(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    old, new = Entry(NOW - 31 * 86_400, "ab", 1), Entry(NOW, "ab", 2, 1.5, 10, 0.5, True)
    policies.add(path, old)
    assert policies.read(path, NOW - 31 * 86_400) == [old]
    path.write_text(path.read_text() + '{"at": 12, "run"\n')  # a process that was killed
    policies.add(path, new)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [vars(old), vars(new)]
    assert policies.read(path, NOW) == [new]
    assert policies.read(tmp_path / "none", NOW) == []


def test_a_clock_that_was_400_days_ahead_erases_nothing_and_blocks_for_a_day(
    tmp_path: Path,
) -> None:
    path, day = tmp_path / "history.jsonl", 86_400
    first = Entry(NOW - 60, "ab", 1, accepted=True)
    ahead = Entry(NOW + 400 * day, "cd", 1, bytes=1000.0)
    policies.add(path, first)
    policies.add(path, ahead)
    asked = pb.Policy(separation=2, daily_bytes=1000)

    def before(now: float) -> list[str]:
        return policies.before_check_in(asked, {}, 5, policies.read(path, now), now)

    assert policies.with_lease(asked, policies.read(path, NOW), "ab", 2, NOW) == ["separation"]
    assert before(NOW) == []
    policies.add(path, Entry(NOW, "ab", 2))
    assert policies.read(path, NOW)[1].at == NOW
    assert before(NOW + 60) == ["daily-bytes"]
    assert before(NOW + day + 60) == []


def test_of_a_huge_history_the_end_is_read(tmp_path: Path) -> None:
    path, new = tmp_path / "history.jsonl", Entry(NOW, "ab", 2)
    path.write_text("x" * (3 << 20) + "\n")
    with path.open("a") as file:
        file.write(json.dumps(vars(new)) + "\n")
    assert policies.read(path, NOW) == [new]


def test_what_does_not_hold_is_said_in_words() -> None:
    assert policies.in_words(["charging", "battery"]) == "not charging, the battery is low"
    assert policies.in_words([]) == ""
