"""Which program a native phone gets: by memory, methods, the run's trainers, lengths and speed."""

from dataclasses import replace

import pytest
import torch

from corolla.phones import budget
from corolla.phones.budget import Able, Assignment, Demand, Timing
from corolla.phones.bundle import Manifest
from tests.server.gateway import gateways

ABLE = Able(
    methods=("grad", "loss"),
    strategies=("fedavg", "mixed"),
    signs=1,
    runtime="executorch 1.5.1",
    memory=4 * 10**9,
    examples=10,
)
MIXED = Demand(kinds={"grad": "strong", "loss": "weak"}, strategy="mixed")
MB = 10**6


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """For 64 tokens: 300 MB to backpropagate, 200 MB for losses, 50 MB for those of 4 bits."""
    adapter = {"m.lora_A": torch.zeros(4, 2), "m.lora_B": torch.zeros(2, 4)}
    return gateways.a_bundle(tmp_path_factory.mktemp("budget") / "bundle", adapter)


def given(manifest: Manifest, able: Able, demand: Demand = MIXED) -> Assignment:
    found = budget.assign(manifest, able, demand)
    assert isinstance(found, Assignment), found
    return found


def why(manifest: Manifest, able: Able, demand: Demand = MIXED) -> str:
    found = budget.assign(manifest, able, demand)
    assert isinstance(found, str), found
    assert "\n" not in found
    return found


@pytest.mark.parametrize(
    ("memory", "methods", "wanted", "expected"),
    [
        (4000, "grad loss", "grad loss", ("grad", "fp32", 64, "A")),
        (1000, "grad loss", "grad loss", ("grad", "fp32", 64, "B")),
        (500, "grad loss", "grad loss", ("loss", "q4", 64, "C")),  # though grad would fit
        (500, "grad loss", "grad", ("grad", "fp32", 64, "C")),
        (499, "grad loss", "grad", ("grad", "fp32", 32, "C")),
        (125, "grad loss", "grad", ("grad", "fp32", 16, "D")),
        (4000, "loss", "grad loss", ("loss", "q4", 64, "A")),
        (4000, "grad loss", "loss", ("loss", "q4", 64, "A")),
        (100, "grad loss", "grad loss", ("loss", "q4", 64, "D")),
        (83, "loss", "loss", ("loss", "q4", 32, "D")),
        (21, "loss", "loss", ("loss", "q4", 16, "D")),
        (20, "loss", "loss", "loss of q4 at 16 tokens needs 12 MB, found 12 MB (60% of 20 MB"),
        (20, "grad loss", "grad", "grad of fp32 at 16 tokens needs 75 MB, found 12 MB"),
        (0, "grad loss", "grad loss", "loss of q4 at 16 tokens needs 12 MB, found 0 MB"),
        (4000, "grad", "loss", "it can do grad, wanted is loss"),
        (4000, "", "grad loss", "it can do none, wanted is grad and loss"),
        (4000, "handwaving", "grad", "it can do handwaving, wanted is grad"),
    ],
)
def test_the_choice(
    memory: int,
    methods: str,
    wanted: str,
    expected: tuple[str, str, int, str] | str,
    manifest: Manifest,
) -> None:
    able = replace(ABLE, memory=memory * MB, methods=tuple(methods.split()))
    demand = replace(MIXED, kinds={name: MIXED.kinds[name] for name in wanted.split()})
    if isinstance(expected, str):
        assert expected in why(manifest, able, demand)
        return
    found = given(manifest, able, demand)
    assert (found.method, found.program, found.length, found.budget) == expected
    assert found.kind == MIXED.kinds[found.method]
    assert found.rank == 4
    planned = manifest.program(found.program).methods[found.method].planned[found.length]  # type: ignore[index]
    assert found.planned_bytes == planned <= budget.SHARE * able.memory


@pytest.mark.parametrize(
    ("held", "memory", "wanted", "expected"),
    [
        ("fp32", 500, "grad loss", ("loss", "fp32", 64)),  # without it, q4
        ("fp32", 300, "grad loss", ("loss", "fp32", 32)),
        ("fp32", 80, "grad loss", ("loss", "q4", 32)),  # 50 MB for 16 tokens: too much
        ("q4", 4000, "grad loss", ("loss", "q4", 64)),  # without it, fp32
        ("q4", 4000, "grad", ("grad", "fp32", 64)),
        ("gone", 4000, "grad loss", ("grad", "fp32", 64)),
    ],
)
def test_a_program_that_is_held_is_kept_for_as_long_as_it_fits(
    held: str, memory: int, wanted: str, expected: tuple[str, str, int], manifest: Manifest
) -> None:
    able = replace(ABLE, memory=memory * MB, held=held)
    demand = replace(MIXED, kinds={name: MIXED.kinds[name] for name in wanted.split()})
    found = given(manifest, able, demand)
    assert (found.method, found.program, found.length) == expected


def test_without_a_round_memory_decides_and_there_is_no_class(manifest: Manifest) -> None:
    for memory, expected in ((3000, ("grad", "fp32")), (300, ("loss", "q4"))):
        found = given(manifest, replace(ABLE, memory=memory * MB), Demand())
        assert (found.method, found.program, found.kind) == (*expected, "")


def test_who_has_no_room_for_the_quantised_base_does_not_get_the_exact_one(
    manifest: Manifest,
) -> None:
    """Without the program of 4 bits the exact one serves losses too."""
    programs = [own for own in manifest.programs if own.name == "fp32"]
    exact = manifest.model_copy(update={"programs": programs})
    able = replace(ABLE, memory=400 * MB, methods=("loss",))
    assert given(exact, able).program == "fp32"
    assert "loss of fp32" in why(exact, replace(able, memory=50 * MB))


@pytest.mark.parametrize(
    ("own", "run", "expected"), [(0, 0, 64), (40, 0, 40), (0, 48, 48), (40, 48, 40), (999, 999, 64)]
)
def test_the_shortest_of_all_limits_of_tokens_holds(
    own: int, run: int, expected: int, manifest: Manifest
) -> None:
    assert given(manifest, replace(ABLE, length=own), replace(MIXED, length=run)).length == expected


def test_a_device_of_middling_memory_backpropagates_on_short_sequences(manifest: Manifest) -> None:
    methods = manifest.programs[0].methods
    light = {
        kind: own.model_copy(update={"planned": {512: 1 * MB}}) for kind, own in methods.items()
    }
    program = manifest.programs[0].model_copy(update={"methods": light})
    long = manifest.model_copy(update={"length": 512, "programs": [program]})
    assert given(long, replace(ABLE, memory=1000 * MB)).length == 128
    assert given(long, ABLE).length == 512
    losses = replace(ABLE, memory=1000 * MB, methods=("loss",))
    assert given(long, losses).length == 512


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"signs": 2}, "it speaks sign streams of version 2, this gateway 1"),
        ({"signs": 0}, "version 0"),
        (
            {"runtime": "executorch 1.4.9"},
            "need executorch 1.5.0 or later, found 'executorch 1.4.9'",
        ),
        ({"runtime": ""}, "found 'none'"),
        ({"runtime": "litert 9.9"}, "found 'litert 9.9'"),
        ({"strategies": ("fedavg",)}, "the run is of strategy mixed, it knows fedavg"),
        ({"strategies": ()}, "it knows none"),
    ],
)
def test_who_cannot_take_part_is_told_why(
    changes: dict[str, object], expected: str, manifest: Manifest
) -> None:
    assert expected in why(manifest, replace(ABLE, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("runtime", ["executorch 1.5.0", "executorch 1.5", "executorch 2.0.0a1"])
def test_runtimes_that_are_new_enough(runtime: str, manifest: Manifest) -> None:
    given(manifest, replace(ABLE, runtime=runtime))


def test_what_was_measured_keeps_a_phone_out_of_what_it_cannot_finish(manifest: Manifest) -> None:
    """8 of 10 examples in each of 5 steps: 40 passes of 64 tokens, 0.5 s each, are 20 s."""
    demand = replace(
        MIXED,
        passes={"grad": lambda n: 5, "loss": lambda n: 10},
        batch={"grad": 8, "loss": 8},
        seconds=20.0,
    )
    slow = replace(ABLE, timings=(Timing("fp32", "grad", 32, 0.25),))
    assert given(manifest, slow, demand).method == "grad"
    assert given(manifest, slow, replace(demand, seconds=19.0)).length == 32
    assert given(manifest, slow, replace(demand, seconds=4.0)).method == "loss"
    few = replace(slow, examples=2)
    assert given(manifest, few, replace(demand, seconds=5.0)).length == 64
    only = replace(demand, kinds={"grad": "strong"}, seconds=4.0)
    assert why(manifest, slow, only) == (
        "it is too slow: grad of fp32 at 16 tokens would take 5 s, the round has 4 s left"
    )


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_time_that_is_none_is_not_counted(seconds: float, manifest: Manifest) -> None:
    odd = replace(ABLE, timings=(Timing("fp32", "grad", 32, seconds), Timing("fp32", "grad", 0, 1)))
    demand = replace(MIXED, passes={"grad": lambda n: 5}, batch={"grad": 8}, seconds=1.0)
    assert given(manifest, odd, demand).method == "grad"


def test_methods_stand_for_the_trainers_of_runs() -> None:
    assert budget.TRAINERS == {"grad": "first_order", "loss": "zeroth_order"}
    assert [own.name for own in budget.BUDGETS] == ["A", "B", "C", "D"]
