"""The faults that one process can play, by the numbers of the fault matrix (docs/deploy.md).

A federation of four on a network that lies, drops and repeats. Whatever one client does, the run
goes on, the verdict says what it was, and the aggregate is that of the others: computed here from
dense fp64 matrices. The other numbers need processes, disks and clocks: tests/e2e.
"""

import io
import math
import pickle
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corolla.errors import RoundError, WireError
from corolla.proto import update_pb2 as pb
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.round import RoundResult, run_round
from corolla.server.rounds.verdicts import Code
from corolla.tensors import tree
from corolla.wire import codec
from corolla.wire.messages import pack_reply, unpack_reply
from corolla.wire.packet import Packet, from_flower
from tests.server.rounds.lying import (
    EXAMPLES,
    FRESH,
    HONEST,
    LENGTH,
    Fault,
    Lying,
    Server,
    mean,
    same,
    update,
)

STRATEGIES = ["fedavg", "flora"]
"""One whose sums are enough, and one that keeps every update."""


def fails(strategy: str, fault: Fault, *codes: Code, **settings: Any) -> RoundResult:
    """A round with `cyd` at fault, and one without; the first is that of the others alone."""
    server = Server(strategy, settings)
    found = server.step(cyd=fault)
    assert found.verdicts["cyd"].code in codes
    assert {c: v.code for c, v in found.verdicts.items() if c != "cyd"} == dict.fromkeys(
        HONEST, Code.ACCEPTED
    )
    assert found.num_examples == {client: EXAMPLES[client] for client in HONEST}
    assert set(found.dropped) == {"cyd"}
    first = mean(strategy, HONEST)
    same(server.dense(), first)
    assert server.step().verdicts["cyd"].code == Code.ACCEPTED
    same(server.dense(), [a + b for a, b in zip(first, mean(strategy, EXAMPLES, 2), strict=True)])
    return found


def passes(strategy: str, fault: Fault, **settings: Any) -> RoundResult:
    """A round in which what `cyd` does is harmless: it counts, exactly once."""
    server = Server(strategy, settings)
    found = server.step(cyd=fault)
    assert {verdict.code for verdict in found.verdicts.values()} == {Code.ACCEPTED}
    assert found.num_examples == EXAMPLES
    same(server.dense(), mean(strategy, EXAMPLES))
    return found


# How an answer goes wrong


def changed(**fields: Any) -> Fault:
    return lambda packet: [pack_reply(replace(unpack_reply(packet, 1 << 30), **fields))]


def raw(change: Callable[[pb.Reply], None], more: bytes = b"") -> Fault:
    """Headers that no honest sender can write."""

    def fault(packet: Packet) -> list[Packet]:
        head = pb.Reply.FromString(packet.header)
        change(head)
        return [Packet(head.SerializeToString() + more, packet.payload)]

    return fault


def tensors(change: Callable[[dict[str, Tensor]], None]) -> Fault:
    """The tensors of the first group, changed and packed again."""

    def fault(packet: Packet) -> list[Packet]:
        payload = {group: dict(own) for group, own in codec.decode(packet.payload).items()}
        change(next(own for own in payload.values() if own))
        reply = unpack_reply(packet, 1 << 30)
        return [pack_reply(replace(reply, payload=codec.encode(payload)))]

    return fault


def of_a(function: Callable[[Tensor], Tensor]) -> Fault:
    def change(params: dict[str, Tensor]) -> None:
        params["m.lora_A"] = function(params["m.lora_A"]).contiguous()

    return tensors(change)


def noted(kept: list[Packet], passes: bool = True) -> Fault:
    """The answer is kept; it arrives, or not."""

    def fault(packet: Packet) -> list[Packet]:
        kept.append(packet)
        return [packet] if passes else []

    return fault


def entry(value: float) -> Fault:
    return of_a(lambda t: t.flatten().index_fill(0, torch.tensor([1]), value).reshape(t.shape))


each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@each_strategy
def test_01_a_client_that_raises_is_left_out(strategy: str) -> None:
    found = fails(strategy, changed(error="ValueError", payload=b""), Code.CLIENT_ERROR)
    assert found.verdicts["cyd"].why == "ValueError"


@each_strategy
def test_02_a_client_that_dies_is_missing_at_the_deadline(strategy: str) -> None:
    fails(strategy, lambda packet: [None], Code.NO_ANSWER)
    fails(strategy, lambda packet: [], Code.NO_ANSWER)


@each_strategy
def test_05_when_all_fail_nothing_changes_and_another_cohort_is_asked(strategy: str) -> None:
    server = Server(strategy, {"quorum": 0.75})
    before = tree.digest_all(server.state)
    with pytest.raises(RoundError) as raised:
        server.step(**{client: changed(error="disk full", payload=b"") for client in EXAMPLES})
    assert {v.code for v in raised.value.verdicts.values()} == {Code.CLIENT_ERROR}
    assert set(raised.value.verdicts) == set(EXAMPLES)
    assert (server.round, tree.digest_all(server.state)) == (1, before)
    server.step()
    same(server.dense(), mean(strategy, EXAMPLES))


def test_05_the_next_attempt_draws_anew() -> None:
    """So that the same broken clients do not end a run."""
    server = Server("fedavg")
    config = server.federation.config.model_copy(update={"cohort": 2})
    federation = replace(server.federation, config=config)
    cohorts = set()
    for attempt in range(5):
        network = Lying("fedavg")
        found = run_round(RoundCall(federation, server.state, {}, 1, attempt=attempt), network)
        cohorts.add(frozenset(found.num_examples))
    assert len(cohorts) > 1
    assert {len(cohort) for cohort in cohorts} == {2}


@each_strategy
def test_06_fewer_than_the_quorum_leave_everything_as_it_was(strategy: str) -> None:
    server = Server(strategy, {"quorum": 0.75})
    before = tree.digest_all(server.state)
    with pytest.raises(RoundError, match="2 of 4 clients gave a valid update, 3 are needed") as r:
        server.step(cyd=entry(math.nan), dot=lambda packet: [None])
    assert tree.digest_all(server.state) == before
    codes = {client: verdict.code for client, verdict in r.value.verdicts.items()}
    assert codes == {
        "ada": Code.ACCEPTED,
        "ben": Code.ACCEPTED,
        "cyd": Code.NOT_FINITE,
        "dot": Code.NO_ANSWER,
    }


@each_strategy
def test_07_a_straggler_is_missing_in_its_round_and_stale_in_the_next(strategy: str) -> None:
    server = Server(strategy)
    late: list[Packet] = []
    assert server.step(cyd=noted(late, passes=False)).verdicts["cyd"].code == Code.NO_ANSWER
    found = server.step(cyd=lambda packet: late)
    assert found.verdicts["cyd"].code == Code.STALE
    both = [mean(strategy, HONEST, round) for round in (1, 2)]
    same(server.dense(), [a + b for a, b in zip(*both, strict=True)])


def test_07_after_a_simulated_deadline_an_answer_is_late() -> None:
    classes = {"slow": {"share": 1, "speed": 0.1}, "fast": {"share": 1}}
    server = Server("fedavg", {"classes": classes, "step_seconds": 1.0, "deadline_simulated": 5.0})
    found = server.step()
    codes = {verdict.code for verdict in found.verdicts.values()}
    assert codes == {Code.ACCEPTED, Code.LATE}
    late = {client for client, verdict in found.verdicts.items() if verdict.code == Code.LATE}
    assert late == {c for c in EXAMPLES if server.federation.class_of(c) == "slow"}
    same(server.dense(), mean("fedavg", EXAMPLES.keys() - late))


@each_strategy
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_08_values_that_are_not_finite_cost_their_sender_the_round(
    strategy: str, value: float
) -> None:
    fails(strategy, of_a(lambda t: t * value), Code.NOT_FINITE)
    fails(strategy, entry(value), Code.NOT_FINITE)


@each_strategy
def test_09_one_infinite_value_is_refused_before_anything_is_clipped(strategy: str) -> None:
    server = Server(strategy, {"robust": "norm_clip"})
    found = server.step(cyd=entry(math.inf))
    assert found.verdicts["cyd"].code == Code.NOT_FINITE
    assert all(np.isfinite(part).all() for part in server.dense())
    wanted = Server(strategy, {"robust": "norm_clip"})
    wanted.step(cyd=lambda packet: [None])
    same(server.dense(), wanted.dense())


@each_strategy
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.T,
        lambda t: t[:1],
        lambda t: t[:, :1],
        lambda t: t.sum(),
        lambda t: t[None],
        lambda t: t[:0],
        lambda t: t.flatten(),
        lambda t: torch.cat([t, t]),
    ],
)
def test_10_other_shapes_are_refused(strategy: str, change: Callable[[Tensor], Tensor]) -> None:
    fails(strategy, of_a(change), Code.FORM)


@each_strategy
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64),
        *(torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn),
    ],
)
def test_11_other_types_are_refused(strategy: str, dtype: torch.dtype) -> None:
    fails(strategy, of_a(lambda t: t.to(dtype)), Code.FORM, Code.MALFORMED)


@pytest.mark.parametrize("name", ["<U4", ">f4", "object", "F4", "", "f32", "F8_E8M0", "C64"])
def test_11_types_that_safetensors_has_not_are_refused(name: str) -> None:
    """Text, the other byte order, objects: there is no name for them."""

    def renamed(packet: Packet) -> list[Packet]:
        data = packet.payload
        length = int.from_bytes(data[:8], "little")
        head = data[8 : 8 + length].rstrip().replace(b'"F32"', f'"{name}"'.encode(), 1)
        payload = len(head).to_bytes(8, "little") + head + data[8 + length :]
        return [pack_reply(replace(unpack_reply(packet, 1 << 30), payload=payload))]

    fails("fedavg", renamed, Code.MALFORMED)


@each_strategy
@pytest.mark.parametrize(
    "change",
    [
        lambda params: params.pop("m.lora_A"),
        lambda params: params.update(extra=torch.zeros(1)),
        lambda params: params.update({"m.lora_a": params.pop("m.lora_A")}),
        lambda params: params.update({"": params.pop("m.lora_A")}),
        lambda params: params.clear(),
    ],
)
def test_12_other_names_are_refused(
    strategy: str, change: Callable[[dict[str, Tensor]], None]
) -> None:
    fails(strategy, tensors(change), Code.FORM, Code.MALFORMED)


@each_strategy
def test_12_another_order_of_the_same_names_is_accepted(strategy: str) -> None:
    def turned(packet: Packet) -> Iterable[Packet | None]:
        groups = [(g, list(p.items())) for g, p in codec.decode(packet.payload).items()]
        payload = {group: dict(reversed(params)) for group, params in reversed(groups)}
        return changed(payload=codec.encode(payload))(packet)

    passes(strategy, turned)


@each_strategy
def test_13_a_payload_beyond_its_limit_is_refused_unread(strategy: str) -> None:
    big = b"\xff" * (50 << 20)
    sent = changed(payload=big)
    fails(strategy, sent, Code.TOO_LARGE)
    server, kept = Server(strategy), list[Packet]()
    server.step(cyd=noted(kept))
    packets = list(sent(kept[0]))
    tracemalloc.start()
    server.step(cyd=lambda packet: packets)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20  # of 50 MiB: nothing of it is copied


@each_strategy
@pytest.mark.parametrize(
    ("size", "most"), [(1e30, LENGTH), (1e30, None), (1e7, None), (1e7, LENGTH), (20.0, LENGTH)]
)
def test_14_a_huge_update_is_refused_and_the_bound_holds(
    strategy: str, size: float, most: float | None
) -> None:
    fails(strategy, of_a(lambda t: torch.full_like(t, size)), Code.NORM, max_norm=most)


@each_strategy
def test_14_what_is_accepted_moves_the_model_by_the_bound_at_most(strategy: str) -> None:
    """All clients just within it, in one direction: the worst that can be."""
    server = Server(strategy, {"max_norm": LENGTH})

    def longest(packet: Packet) -> Iterable[Packet | None]:
        own: dict[str, Tensor] = {n: torch.zeros(t.shape) for n, t in FRESH.items()}
        own["m.lora_A"][0, 0] = own["m.lora_B"][0, 0] = math.sqrt(LENGTH)
        if strategy == "fedavg":
            own["m.lora_A"][0, 0], own["m.lora_B"][0, 0] = LENGTH, 0.0
        payload = {
            group: {n: own[n] for n in params}
            for group, params in update(strategy, "cyd", 1).items()
        }
        return changed(payload=codec.encode(payload))(packet)

    found = server.step(**dict.fromkeys(EXAMPLES, longest))
    assert {verdict.code for verdict in found.verdicts.values()} == {Code.ACCEPTED}
    moved = math.sqrt(sum(float(np.square(part).sum()) for part in server.dense()))
    assert moved == pytest.approx(LENGTH, rel=1e-6)


COUNT = pb.Reply.DESCRIPTOR.fields_by_name["num_examples"].number


@each_strategy
@pytest.mark.parametrize(
    ("value", "more"),
    [
        (0, b""),
        (10**12, b""),
        (2**64 - 15, b""),  # what -15 is in this type
        (2**40 + 1, b""),
        (9, b""),  # one batch has 8
        (0, bytes([COUNT << 3 | 1]) + np.float64(math.nan).tobytes()),
        (0, bytes([COUNT << 3 | 1]) + np.float64(math.inf).tobytes()),
        (0, bytes([COUNT << 3 | 2, 3, 5, 5, 5])),  # a list
        (0, bytes([COUNT << 3 | 5]) + np.float32(7.0).tobytes()),
    ],
)
def test_15_a_weight_that_cannot_be_is_refused(strategy: str, value: int, more: bytes) -> None:
    fault = raw(lambda head: setattr(head, "num_examples", value), more)
    fails(strategy, fault, Code.WEIGHT, Code.MALFORMED)


def test_15_the_weights_of_a_round_sum_to_something() -> None:
    server = Server("fedavg")
    none = raw(lambda head: head.ClearField("num_examples"))
    with pytest.raises(RoundError):
        server.step(**dict.fromkeys(EXAMPLES, none))


@each_strategy
def test_16_who_answers_twice_counts_once(strategy: str) -> None:
    passes(strategy, lambda packet: [packet, packet])
    passes(strategy, lambda packet: [packet, *entry(math.nan)(packet)])
    passes(strategy, lambda packet: [packet, *changed(client="ada")(packet), None])
    fails(strategy, lambda packet: [*entry(math.nan)(packet), packet], Code.NOT_FINITE)


@each_strategy
def test_16_nobody_answers_for_another(strategy: str) -> None:
    fails(strategy, changed(client="ada"), Code.FOREIGN)


@each_strategy
def test_17_the_reply_of_an_earlier_round_is_stale(strategy: str) -> None:
    """Also with the number of this round: it names the model that it was made from."""
    server, kept = Server(strategy), list[Packet]()
    server.step(cyd=noted(kept))
    assert server.step(cyd=lambda packet: kept).verdicts["cyd"].code == Code.STALE
    forged = changed(round=3)(kept[0])
    assert server.step(cyd=lambda packet: forged).verdicts["cyd"].code == Code.STALE
    parts = [mean(strategy, EXAMPLES, 1), mean(strategy, HONEST, 2), mean(strategy, HONEST, 3)]
    same(server.dense(), [sum(part) for part in zip(*parts, strict=True)])


class Marker:
    """What a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def files(path: Path) -> dict[str, bytes]:
    """Payloads in other formats, some of which run code or allocate what they claim."""
    array, objects, zipped = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros((2, 3), dtype=np.float32))
    np.save(objects, np.array([Marker(path)], dtype=object), allow_pickle=True)
    np.savez(zipped, a=np.zeros(3))
    torch_file = io.BytesIO()
    torch.save({"m.lora_A": torch.zeros(2, 3)}, torch_file)

    def lying(size: int) -> bytes:
        return array.getvalue().replace(b"(2, 3)", f"({size},)".encode())

    return {
        "pickle": pickle.dumps(Marker(path)),
        "npy": array.getvalue(),
        "npy of objects": objects.getvalue(),
        "npz": zipped.getvalue(),
        "torch": torch_file.getvalue(),
        "npy of 1 GB": lying(1 << 28),
        "npy of 4 TB": lying(1 << 40),
        "safetensors of 4 TB": b'\x50\x00\x00\x00\x00\x00\x00\x00{"a/x":{"dtype":"F32","shape"'
        + b':[1099511627776],"data_offsets":[0,4398046511104]}}      ',
    }


@pytest.mark.parametrize("name", [*files(Path("x")), "truncated"])
def test_18_other_formats_and_truncated_ones_are_refused_and_nothing_runs(
    tmp_path: Path, name: str
) -> None:
    mark = tmp_path / "ran"
    payloads = files(mark)

    def fault(packet: Packet) -> Iterable[Packet | None]:
        return changed(payload=payloads.get(name, packet.payload[:-5]))(packet)

    tracemalloc.start()
    fails("fedavg", fault, Code.MALFORMED)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
    assert not mark.exists()


@pytest.mark.parametrize("name", [*files(Path("x"))])
def test_18_the_array_around_a_packet_is_not_parsed_either(tmp_path: Path, name: str) -> None:
    from flwr.app import Array as FlowerArray
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

    mark = tmp_path / "ran"
    data = files(mark)[name]
    records = RecordDict({"header": ConfigRecord({"packet": b""})})
    array = FlowerArray(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=data)
    records["payload"] = ArrayRecord({"packet": array})
    with pytest.raises(WireError):
        from_flower(records, 1 << 20)
    assert not mark.exists()


@each_strategy
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.7e308])
def test_19_metrics_that_are_no_numbers_are_dropped_and_the_update_counts(
    strategy: str, value: float
) -> None:
    found = passes(strategy, raw(lambda head: head.metrics.update({"train_loss": value})))
    assert found.metrics["train_loss"] == 1.0
    assert set(found.client_loss) == HONEST


@each_strategy
def test_19_a_metric_that_is_a_list_does_not_count(strategy: str) -> None:
    """In a map of this type a list cannot be written: whatever its bytes are, they are no list."""
    key = b"\x0a\x05extra"
    values = b"\x12\x10" + np.array([1.0, 2.0]).tobytes()
    ragged = b"\x42" + bytes([len(key + values)]) + key + values
    found = passes(strategy, raw(lambda head: None, ragged))
    assert found.metrics.get("extra", 0.0) == 0.0
    fails(
        strategy, raw(lambda h: h.metrics.update({f"{i}": 1 for i in range(300)})), Code.MALFORMED
    )


@each_strategy
def test_24_what_arrives_after_a_partition_has_healed_counts_for_no_round(strategy: str) -> None:
    """The round went on without the two; now their old answers come before their new ones."""
    server = Server(strategy)
    kept: dict[str, list[Packet]] = {"cyd": [], "dot": []}
    server.step(**{client: noted(own, passes=False) for client, own in kept.items()})
    same(server.dense(), mean(strategy, {"ada", "ben"}))
    found = server.step(
        cyd=lambda packet: [*kept["cyd"], packet], dot=lambda packet: [packet, *kept["dot"]]
    )
    codes = {client: verdict.code for client, verdict in found.verdicts.items()}
    assert codes == {
        "ada": Code.ACCEPTED,
        "ben": Code.ACCEPTED,
        "cyd": Code.STALE,
        "dot": Code.ACCEPTED,
    }
    both = [mean(strategy, {"ada", "ben"}, 1), mean(strategy, HONEST, 2)]
    same(server.dense(), [a + b for a, b in zip(*both, strict=True)])


@each_strategy
def test_26_an_update_of_zeros_is_legal_and_has_its_weight(strategy: str) -> None:
    def zeros(packet: Packet) -> Iterable[Packet | None]:
        payload = {g: tree.scale(p, 0.0) for g, p in codec.decode(packet.payload).items()}
        return changed(payload=codec.encode(payload))(packet)

    server = Server(strategy, {"max_norm": LENGTH})
    found = server.step(cyd=zeros)
    assert found.verdicts["cyd"].code == Code.ACCEPTED
    share = sum(EXAMPLES[c] for c in HONEST) / sum(EXAMPLES.values())
    same(server.dense(), [share * part for part in mean(strategy, HONEST)])
    server = Server(strategy)
    server.step(**dict.fromkeys(EXAMPLES, zeros))
    assert not any(part.any() for part in server.dense())


@each_strategy
def test_the_order_of_arrival_does_not_matter(strategy: str) -> None:
    """What a fault changes must not be the bits of the others."""
    digests = set()
    for order in (("ada", "ben", "cyd", "dot"), ("dot", "cyd", "ada", "ben")):
        server = Server(strategy, order=order)
        server.step(cyd=entry(math.nan))
        digests.add(tree.digest_all(server.state))
    assert len(digests) == 1
