"""The fuzzer runs, counts what it promises, and reports what escapes."""

import json
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest

from corolla.server.deployment import front
from experiments.bench import fuzz, fuzz_front, fuzz_targets


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


NUMBERS = {"messages": 13_200, "requests": 1_000, "replies": 800}
"""Cases of each section; with 5,000 for the native client these are 20,000."""
MOST = 64_000_000 / 2**20
"""MiB that reading cases may take."""


def most(notes: list[str]) -> float:
    """MiB more while cases are read."""
    return float(notes[1].split("at most ")[1].split()[0])


@pytest.mark.parametrize("name", NUMBERS)
def test_nothing_raises_and_little_memory_is_taken(name: str) -> None:
    options = fuzz.Options(cases=NUMBERS[name])
    notes = fuzz.SECTIONS[name](options).notes
    assert notes[0] == f"{NUMBERS[name]:,} cases, 0 exceptions escaped", notes
    assert most(notes) <= MOST


def test_without_a_build_of_the_native_client_its_section_says_so(tmp_path: Path) -> None:
    notes = fuzz.native(fuzz.Options(build=str(tmp_path))).notes
    assert notes == [f"no corolla-native-check in {tmp_path}: make phone, or name one with --build"]


def test_an_application_that_fails_is_found() -> None:
    with (
        fuzz_front.served() as served,
        patch.object(front, "_malformed", side_effect=KeyError),
        pytest.raises(AssertionError, match="the application failed"),
    ):
        served.statuses(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n\r\n")


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

    assert most(fuzz.many("none", 0, 1, case(1))) < 8
    assert most(fuzz.many("none", 0, 1, case(64 << 20))) > 32


@pytest.mark.skipif(find_spec("atheris") is not None, reason="atheris is installed")
def test_without_atheris_the_guided_section_says_so() -> None:
    notes = fuzz.guided(fuzz.Options(runs=1)).notes
    assert notes == ["atheris is not installed: pip install atheris"]
