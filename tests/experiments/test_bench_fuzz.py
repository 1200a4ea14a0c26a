"""The fuzzer runs, counts what it promises, and reports what escapes."""

import json
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments.bench import fuzz, fuzz_targets


def test_all_numbers_are_written(tmp_path: Path) -> None:
    file = tmp_path / "fuzz.json"
    assert fuzz.main(["replies", "messages", "--json", str(file), "--cases", "60"]) == 0
    found = json.loads(file.read_text())
    assert found["machine"].keys() >= {"cpu", "cores", "threads", "torch", "date"}
    for name in ("replies", "messages"):
        section = found["sections"][name]
        assert sum(row["cases"] for row in section["rows"]) == 60
        assert section["notes"][0] == "60 cases, 0 exceptions escaped"
    replies = found["sections"]["replies"]["rows"]
    assert {row["reply"] for row in replies} == {target.name for target in fuzz_targets.targets()}
    assert all(0 < row["largest change / bound"] <= 1 for row in replies)


def test_what_escapes_is_counted_and_shown() -> None:
    def case(rng: random.Random) -> Callable[[], None]:
        def check() -> None:
            if rng.random() < 2:
                raise KeyError("seven")

        return check

    notes = fuzz.many("none", 5, 3, case)
    assert notes[0] == "3 cases, 3 exceptions escaped"
    assert notes[2].startswith("case 5: KeyError('seven') at check:")


def test_memory_is_that_of_reading_a_case_not_of_making_it() -> None:
    def case(size: int) -> Callable[[random.Random], Callable[[], None]]:
        def made(rng: random.Random) -> Callable[[], None]:
            assert rng.randbytes(32 << 20)
            return check

        def check() -> None:
            assert bytearray(b"x") * size

        return made

    def most(notes: list[str]) -> float:
        return float(notes[1].split("at most ")[1].split()[0])

    assert most(fuzz.many("none", 0, 1, case(1))) < 8
    assert most(fuzz.many("none", 0, 1, case(64 << 20))) > 32


@pytest.mark.skipif(find_spec("atheris") is not None, reason="atheris is installed")
def test_without_atheris_the_guided_section_says_so() -> None:
    notes = fuzz.guided(fuzz.Options(runs=1)).notes
    assert notes == ["atheris is not installed: pip install atheris"]
