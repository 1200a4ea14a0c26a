"""The settings of a task are one text beside its payload, read by servers, gateways and clients."""

import json
from dataclasses import replace

import pytest
import torch

from corolla.errors import WireError
from corolla.types import LoraSpec, Payload
from corolla.wire.task_settings import RunSettings, TaskSettings

RUN = {"strategy": "fedavg", "lr": 1e-4, "name": "né", "nested": {"b": [1, None], "a": True}}
FORM: Payload = {"adapter": {"x": torch.ones(2, 3)}}
LEAST = TaskSettings(LoraSpec(2, 4.0), "strong", 9, 3, RUN)


def test_settings_have_the_text_they_always_had() -> None:
    lora = '"lora": {"rank": 2, "alpha": 4.0, "rslora": false}'
    counted = f'{{{lora}, "class": "strong", "population": 9, "accepted": 3'
    run = f'"run": {json.dumps(RUN)}}}'
    assert LEAST.to_json() == f"{counted}, {run}"
    form = '{"adapter": {"x": ["float32", [2, 3]]}}'
    assert replace(LEAST, like=FORM, labels=("no", "né"), fresh=FORM).to_json() == (
        f'{counted}, "form": {form}, "labels": ["no", "n\\u00e9"], "fresh": {form}, {run}'
    )
    assert '"form": {}, "labels": [], ' in replace(LEAST, like={}, labels=()).to_json()


@pytest.mark.parametrize("full", [LEAST, replace(LEAST, like=FORM, labels=["a"], fresh=FORM)])
def test_settings_come_back(full: TaskSettings) -> None:
    found = TaskSettings.from_json(full.to_json())
    assert found.to_json() == full.to_json()
    assert (found.lora, found.kind, found.population) == (full.lora, "strong", 9)
    assert (found.accepted, found.run, found.labels) == (3, RUN, full.labels)


@pytest.mark.parametrize("key", ["lora", "class", "population", "accepted", "run"])
def test_settings_that_lack_something_cannot_be_read(key: str) -> None:
    told = json.loads(LEAST.to_json())
    del told[key]
    with pytest.raises(KeyError, match=key):
        TaskSettings.from_json(json.dumps(told))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", ValueError),
        ("not json", ValueError),
        ("[" * 100_000, ValueError),
        ("[]", TypeError),
        ('{"lora": {"rank": 2, "width": 3}}', TypeError),
    ],
)
def test_no_settings_cannot_be_read(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        TaskSettings.from_json(text)


@pytest.mark.parametrize("key", ["form", "fresh"])
def test_forms_that_are_none_are_refused(key: str) -> None:
    for wrong in ([1], {"adapter": {"x": ["float99", [2]]}}, {"adapter": {"x": ["int32", [-1]]}}):
        text = json.dumps({**json.loads(LEAST.to_json()), key: wrong})
        with pytest.raises(WireError, match="form of a payload cannot be read"):
            TaskSettings.from_json(text)


def test_a_hello_tells_of_the_run_alone() -> None:
    assert RunSettings(RUN).to_json() == json.dumps({"run": RUN})
    told = RunSettings(RUN, ("no", "yes"))
    assert told.to_json() == json.dumps({"run": RUN, "labels": ["no", "yes"]})
    assert RunSettings.from_json(told.to_json()) == RunSettings(RUN, ["no", "yes"])


def test_what_a_task_tells_of_its_run_is_read_from_its_settings_too() -> None:
    assert RunSettings.from_json(LEAST.to_json()) == RunSettings(RUN, [])
    with_labels = replace(LEAST, labels=["a", "b"])
    assert RunSettings.from_json(with_labels.to_json()) == RunSettings(RUN, ["a", "b"])
    assert RunSettings.from_json("") == RunSettings({}, [])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "are not JSON"),
        ("[" * 100_000, "are not JSON"),
        ("[1]", "are not an object"),
        ('{"run": []}', "are not an object with run and labels"),
        ('{"run": {}, "labels": "ab"}', "are not an object with run and labels"),
    ],
)
def test_settings_of_a_run_that_cannot_be_read_are_refused(text: str, why: str) -> None:
    with pytest.raises(WireError, match=f"^the task's settings {why}$"):
        RunSettings.from_json(text)
