"""The settings of tasks are the text that clients and gateways of this schema read."""

import json
from typing import Any

from corolla.server.rounds.federation import Federation
from corolla.server.rounds.tasks import Traffic, accepted_note, make_tasks, run_settings
from corolla.types import LoraSpec, Payload
from corolla.wire.envelope import Envelope
from corolla.wire.messages import Kind, Task
from tests.server.rounds.members import CLASSES, CLIENTS, federation

LORA = '"lora": {"rank": 2, "alpha": 16.0, "rslora": false}'
FORM = '{"adapter": {"m.lora_A": ["float32", [2, 3]], "m.lora_B": ["float32", [2, 2]]}}'


def tasks(own: Federation, **held: str) -> dict[str, Task]:
    state = {"adapter": own.fresh(LoraSpec(2, 16.0))}
    known = {name: frozenset([note, "base"]) for name, note in held.items()}
    return make_tasks(own, state, known, 3, Kind.TRAIN, dict.fromkeys(CLIENTS, 1), Traffic())


def text(task: Task, own: Federation) -> str:
    """The settings of a task, but for those of the run, which must come last."""
    run = f', "run": {json.dumps(run_settings(own.config, own.own_devices))}}}'
    assert task.config.endswith(run)
    return task.config.removesuffix(run)


def test_the_settings_of_a_task_are_the_text_they_were() -> None:
    own = federation(classes=CLASSES, strategy="mixed")
    found = tasks(own, ann=accepted_note(2))
    counted = f'{{{LORA}, "class": "strong", "population": 10, "accepted": 2'
    assert text(found["ann"], own) == counted
    assert text(found["bob"], own) == f'{{{LORA}, "class": "weak", "population": 10, "accepted": 0'
    assert text(found["gate"], own) == (
        f'{{{LORA}, "class": "weaker", "population": 10, "accepted": 0, "fresh": {FORM}'
    )


def test_a_compressed_broadcast_tells_its_form_and_devices_get_the_labels() -> None:
    changes: dict[str, Any] = {"codec_down": ["fp16"]}
    own = federation(seats={}, **changes)
    devices = Federation(
        *(own.run_id, own.config, own.strategy, own.clients, own.fresh),
        own_devices=True,
        labels=("né", "no"),
    )
    start = f'{{{LORA}, "class": "", "population": 3, "accepted": 0, "form": {FORM}'
    for one in (own, devices):
        task = tasks(one)["ann"]
        labels = ', "labels": ["n\\u00e9", "no"]' if one.own_devices else ""
        assert text(task, one) == start + labels


def test_cached_groups_travel_in_the_order_of_the_state_whatever_the_hashes_of_names() -> None:
    own = federation(strategy="flora")
    block = own.fresh(LoraSpec(2, 16.0))
    state: Payload = {"head": {}, **{f"block-{i:06d}": block for i in range(8)}}
    made = make_tasks(own, state, {}, 9, Kind.TRAIN, {"ann": 1}, Traffic())
    found = [group for group in Envelope().open(made["ann"]) if group in made["ann"].cached]
    assert found == list(made["ann"].cached)
    assert len(found) == 8
