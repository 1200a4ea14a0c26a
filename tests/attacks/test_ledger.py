"""Ways to make a device's ledger of privacy count less, tried on its file.

What is lost from the end, and an emptied file, are not found: docs/deploy.md says so.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from corolla.errors import ArtefactError
from corolla.host import sealed_lines
from corolla.privacy.accounting import Release
from corolla.privacy.ledger import Ledger

ROUNDS = 4
RUN = "ab" * 16


def changed(lines: list[str]) -> str:
    return "".join(lines).replace('"noise_multiplier": 1.0', '"noise_multiplier": 1000.0', 1)


ATTACKS: dict[str, Callable[[list[str]], str]] = {
    "a line is changed": changed,
    "a line is lost from among others": lambda lines: "".join(lines[:1] + lines[2:]),
    "two lines are swapped": lambda lines: "".join([lines[1], lines[0], *lines[2:]]),
    "a line is there twice": lambda lines: "".join([lines[0], *lines]),
    "the last line counts nothing": lambda lines: "".join(
        [*lines[:-1], lines[-1].replace('"count": 1', '"count": 0')]
    ),
    "a line of another kind follows": lambda lines: "".join([*lines, "garbage\n"]),
}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "ledger.jsonl")
    for round in range(ROUNDS):
        made.spend(RUN, round, Release(1.0, 1.0, 1))
    return made


def unsealed(line: bytes, before: str) -> sealed_lines.Entry | None:
    """A reader that looks at no seal."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return {key: value for key, value in entry.items() if key != "sha256"}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_changed_ledger_neither_tells_nor_spends(
    ledger: Ledger, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ledger.epsilon(1e-5)
    text = ATTACKS[attack](ledger.path.read_text().splitlines(keepends=True))
    ledger.path.write_text(text)
    with monkeypatch.context() as patched:
        patched.setattr(sealed_lines, "_entry", unsealed)
        if attack in ("a line is changed", "a line is lost from among others"):
            assert ledger.epsilon(1e-5) < before
    with pytest.raises(ArtefactError, match="is damaged in line"):
        ledger.epsilon(1e-5)
    with pytest.raises(ArtefactError, match="is damaged in line"):
        ledger.spend(RUN, ROUNDS, Release(1.0, 1.0, 1))
    assert ledger.path.read_text() == text


@pytest.mark.parametrize("left", [b"\0" * 50, b'{"time": "2026', b"\xff\xfe"])
def test_what_a_crash_leaves_at_the_end_costs_nothing_that_was_spent(
    ledger: Ledger, left: bytes
) -> None:
    before = ledger.epsilon(1e-5)
    ledger.path.write_bytes(ledger.path.read_bytes() + left)
    assert ledger.epsilon(1e-5) == before
    ledger.spend(RUN, ROUNDS, Release(1.0, 1.0, 1))
    assert len(ledger.releases()) == ROUNDS + 1


def test_a_link_in_the_ledgers_place_is_followed_and_stays(ledger: Ledger) -> None:
    """An owner may keep it elsewhere: what counts is the file behind it."""
    real = ledger.path.with_name("elsewhere")
    ledger.path.rename(real)
    ledger.path.symlink_to(real)
    ledger.spend(RUN, ROUNDS, Release(1.0, 1.0, 1))
    assert ledger.path.is_symlink()
    assert len(Ledger(real).releases()) == ROUNDS + 1
