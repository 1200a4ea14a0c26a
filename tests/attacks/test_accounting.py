"""A server that lets a device compute what a hundred thousand rounds cost, task by task.

Each look at all releases is counted in place of the seconds that it takes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from corolla.client.device import daemon
from corolla.client.device.daemon import Trainer
from corolla.privacy import accounting
from corolla.wire.messages import Reply, pack_task, unpack_reply
from tests.attacks.devices import Server, device

LONG: dict[str, Any] = {"noise_multiplier": None, "epsilon": 1.0, "rounds": 100_000}
LONG |= {"batch_size": 2, "micro_batch_size": 2}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Noise multipliers of the looks so far, which are as quick as those at few releases."""
    found: list[float] = []

    def quick(counted: Any, delta: float) -> float:
        found.append(counted[0][0])
        return accounting._by_rdp(counted, delta)

    monkeypatch.setattr(accounting, "_by_pld", quick)
    for cached in (accounting._epsilon, accounting._calibrate):
        cached.cache_clear()
    yield found
    for cached in (accounting._epsilon, accounting._calibrate):
        cached.cache_clear()


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Server:
    return Server.of(tiny_model)


@pytest.fixture
def trainer(tmp_path: Path, tiny_model: Path) -> Trainer:
    return device(tmp_path / "device", tiny_model, [{"text": f"row {i}"} for i in range(20)])


def asked(trainer: Trainer, server: Server, wanted: Callable[[], bool], steps: int) -> Reply:
    task = server.task(local_steps=steps, **LONG)
    return unpack_reply(trainer(pack_task(task), wanted), 1 << 30)


def waits(tasks: int) -> Callable[[], bool]:
    """A caller that is gone after it was asked so often."""
    left = iter(range(tasks))
    return lambda: next(left, None) is not None


def test_without_defences_a_device_computes_for_nobody(
    trainer: Trainer, server: Server, looks: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(wanted: Callable[[], bool]) -> AbstractContextManager[None]:
        return nullcontext()

    monkeypatch.setattr(accounting, "while_wanted", deaf)
    monkeypatch.setattr(daemon, "_MOST_STEPS", 1 << 62)
    asked(trainer, server, lambda: False, 20)
    assert len(looks) >= 4


def test_accounting_ends_when_nobody_waits(
    trainer: Trainer, server: Server, looks: list[float]
) -> None:
    reply = asked(trainer, server, waits(2), 2)
    assert reply.error == "given up: nobody waits for this accounting any more"
    assert len(looks) <= 2
    assert not (trainer.own.state / "ledger.jsonl").exists()


def test_a_device_accounts_for_no_more_steps_than_it_can(
    trainer: Trainer, server: Server, looks: list[float]
) -> None:
    reply = asked(trainer, server, lambda: True, 20)
    assert "accounts for at most 300000 steps of a run with dp=example, found 2000000" in (
        reply.error
    )
    assert looks == []
