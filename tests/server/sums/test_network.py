"""Rounds whose updates go to secure sums: exact, silent about members, and refused in time."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from corolla.client.training.worker import Worker
from corolla.commands.check import secure_sums
from corolla.commands.check.probe import Probe, Recorder
from corolla.commands.check.tables import CLIENTS
from corolla.commands.plan import secure as plan
from corolla.commands.simulate import secure
from corolla.config import rules
from corolla.config.build import build_strategy
from corolla.config.load import load
from corolla.config.sums import not_summed
from corolla.directions import seedlog
from corolla.errors import ConfigError, DivergedError, RoundError
from corolla.privacy.client_level import ClientLevel
from corolla.server.rounds.asking import Asking
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, run_round
from corolla.server.rounds.spending import Spending
from corolla.server.rounds.verdicts import Code
from corolla.server.sums.network import SecureNetwork
from corolla.storage.memory import Memory
from corolla.strategies.listing.registry import STRATEGIES
from corolla.sums import device as devices
from corolla.sums import ring, thresholds
from corolla.sums.messages import Listing
from corolla.sums.quantise import Quantiser, within
from corolla.types import Params
from corolla.wire.messages import Kind, Task, pack_task, unpack_reply, unpack_task
from corolla.wire.packet import Packet

ABLE = {
    *("fed_sb", "fedadagrad", "fedadam", "fedavg", "fedavgm", "fedkseed", "fedmezo", "fedprox"),
    *("fedsvd", "fedyogi", "ferret", "ffa_lora", "lisa", "rolora", "seed_pool"),
}
EVERYONE = sorted(CLIENTS)


def test_the_strategies_that_are_able() -> None:
    assert {name for name, cls in STRATEGIES.items() if not not_summed(cls)} == ABLE


@dataclass(frozen=True)
class Losing(Network):
    """A network on which the replies of some members are lost."""

    network: Network
    lost: frozenset[str]

    def clients(self) -> Mapping[str, int]:
        return self.network.clients()

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for name, packet in self.network.ask(packets):
            yield name, None if name in self.lost else packet


@dataclass
class Members:
    """The members of a tiny federation, and rounds of them."""

    probe: secure_sums.MemberProbe
    lost: Sequence[str] = ()

    @property
    def recorder(self) -> Recorder:
        return self.probe.network

    def round(self, attempt: int = 0) -> RoundResult:
        network = SecureNetwork(
            Losing(self.recorder, frozenset(self.lost)), self.probe.worker, 2, 1
        )
        cohort = dict.fromkeys(EVERYONE, 1)
        call = RoundCall(
            self.probe.federation, self.probe.fresh(), {}, 1, attempt=attempt, cohort=cohort
        )
        return run_round(call, network)


@pytest.fixture
def members(tmp_path: Path) -> Members:
    return Members(secure_sums.MemberProbe("fedavg", "bert", tmp_path, {}, secure_sums.CHANGES))


def test_a_round_is_within_the_stated_error_of_a_plain_one(
    members: Members, tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    plain = Probe("fedavg", "bert", tmp_path / "plain")
    cohort = dict.fromkeys(EVERYONE, 1)
    state = plain.fresh()
    wanted = run_round(RoundCall(plain.federation, state, {}, 1, cohort=cohort), plain.network)
    found = members.round()
    moved, exact = (_moved(result.state["adapter"], state["adapter"]) for result in (found, wanted))
    assert found.memory["secure-sum"]["bound"] < 16
    weights = list(wanted.num_examples.values())
    quantiser = Quantiser(16.0, 12, moved.numel())
    # The mean is off by at most half a level a value and client, over the sum of weights.
    level = quantiser.bound * quantiser.weight / (2**23 - 1)
    most = level / 2 * math.sqrt(len(weights) * moved.numel()) / sum(weights)
    assert 0 < float((moved - exact).norm()) < 1.2 * most
    assert found.metrics["train_loss"] == pytest.approx(wanted.metrics["train_loss"], rel=1e-4)
    assert found.metrics["sum_members"] == len(EVERYONE)
    assert found.traffic.up == len(EVERYONE) * 4 * (moved.numel() + 4) == found.cost.up
    assert found.traffic.framing_up > 0


def _moved(after: Params, before: Params) -> torch.Tensor:
    return torch.cat([(after[n].double() - before[n].double()).flatten() for n in sorted(after)])


def test_nothing_of_a_member_is_told(members: Members) -> None:
    found = members.round()
    for name, packet in members.recorder.sent.items():
        reply = unpack_reply(packet, len(packet.payload))
        assert (reply.num_examples, dict(reply.metrics), dict(reply.scalars)) == (0, {}, {})
        vector = members.probe.worker.seen[name]
        sent = np.frombuffer(reply.payload[-4 * len(vector) :], "<u4")
        assert not np.array_equal(sent, vector)
        assert len(reply.payload) == 32 + 16 + 2 + 48 * len(EVERYONE) + 4 * len(vector)
    assert found.num_examples == {}
    assert found.client_loss == {}
    assert set(found.metrics) == {"train_loss", "sum_members", "sum_clipped", "sum_norm"}


def test_what_diverged_is_not_told_in_numbers(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*given: object) -> None:
        raise DivergedError("loss is 1234.5 at local step 1: lower lr")

    monkeypatch.setattr(Worker, "_train", train)
    with pytest.raises(RoundError):
        members.round()
    errors = {unpack_reply(packet, 0).error for packet in members.recorder.sent.values()}
    assert errors == {"what was trained is not finite: lower lr"}


def test_lost_members_are_left_out_and_one_more_is_refused(members: Members) -> None:
    """Seven members, one corrupt, sums of two: two may be lost at each step."""
    members.lost = EVERYONE[:2]
    found = members.round()
    assert [found.verdicts[name].code for name in EVERYONE[:3]] == [
        Code.NO_ANSWER,
        Code.NO_ANSWER,
        Code.ACCEPTED,
    ]
    assert found.metrics["sum_members"] == len(EVERYONE) - 2
    members.lost = EVERYONE[:3]
    again = secure_sums.MemberProbe(
        "fedavg", "bert", members.probe.folder / "again", {}, secure_sums.CHANGES
    )
    with pytest.raises(RoundError, match="4 of 7 members have answered, 5 are needed"):
        Members(again, members.lost).round()


def test_a_round_is_not_opened_twice(members: Members) -> None:
    members.round()
    with pytest.raises(RoundError, match="0 of 7 members have deposited"):
        members.round(attempt=1)


def test_the_check_finds_a_sum_that_is_not_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finding,) = [make() for _, make in secure_sums.proofs(Probe("fedavg", "bert", tmp_path))]
    assert finding.passed
    real = ring.add_masks

    def one_off(vector: ring.Vector, masks: Sequence[ring.Mask]) -> None:
        vector[0] += 1
        real(vector, masks)

    monkeypatch.setattr(devices, "add_masks", one_off)
    (tmp_path / "b").mkdir()
    proofs = secure_sums.proofs(Probe("fedavg", "bert", tmp_path / "b"))
    (finding,) = [make() for _, make in proofs]
    assert not finding.passed
    assert finding.note == "1 values are others"


def test_plain_tasks_are_refused(members: Members) -> None:
    """Without an attempt that was announced a client neither trains nor measures."""
    probe, worker = members.probe, members.probe.worker
    call = RoundCall(probe.federation, probe.fresh(), {}, 1)
    asking = Asking(call, probe.network, Spending(probe.federation.config))
    for kind in (Kind.TRAIN, Kind.EVALUATE):
        task = asking.tasks({}, kind, {"ada": 1})["ada"]
        reply = unpack_reply(worker("ada", pack_task(task)), 0)
        assert "plain" in reply.error
        assert not reply.payload and not reply.metrics


def test_a_network_without_sums_is_refused(members: Members) -> None:
    call = RoundCall(members.probe.federation, members.probe.fresh(), {}, 1)
    with pytest.raises(ConfigError, match="simulations in one process"):
        run_round(call, members.recorder)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("strategy=flora", "not added up, each is used by itself; use fedavg or"),
        ("strategy=scaffold optimizer=sgd", "what its clients keep"),
        ("strategy=fedsa_lora", "models of their own"),
        ("strategy=fisher", "no common bound"),
        ("robust=median", "does not go with robust=median: a rule compares single updates"),
        ("max_norm=1", "no single update to refuse"),
        ("buffer=2", "not one by one"),
        ('codec=["fp16"]', "cannot be compressed"),
        ('codec_down=["fp16"]', "bit for bit"),
        ("dp=example epsilon=8", "each client tells its epsilon: use dp=client"),
        ("dp=client epsilon=8 dp_sampling=poisson", "who is in a secret cohort"),
        ("engine=flower", "in one process"),
        ("classes.a.layers=last:1 classes.b.share=2", "of one form"),
        ("cohort=3 smallest_sum=3", "raise cohort"),
    ],
)
def test_what_secure_sums_do_not_go_with_is_refused_in_one_line(settings: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        build_strategy(load(None, {}, ["secure_sum=true", *settings.split()]))
    assert "\n" not in str(caught.value)


def test_a_federation_that_gives_no_sum_is_refused_at_the_start(tmp_path: Path) -> None:
    probe = secure_sums.MemberProbe("fedavg", "bert", tmp_path, {}, secure_sums.CHANGES)
    wide = probe.config.model_copy(update={"sum_corrupt": 6})
    with pytest.raises(ConfigError, match="7 members with 6 corrupt give no sum of 2"):
        secure.worker(wide, probe.model, probe.data, Memory(tmp_path / "m"))
    made = secure.worker(probe.config, probe.model, probe.data, Memory(tmp_path / "m"))
    assert isinstance(secure.joined(probe.network, made), SecureNetwork)
    assert secure.joined(probe.network, Recorder) is probe.network  # type: ignore[arg-type]


def test_the_plan_knows_thresholds_and_bytes(members: Members) -> None:
    planned = plan.of(members.probe.federation)
    assert planned is not None
    assert (planned.members, planned.missing) == (7, 2)
    assert planned.floor == thresholds.floor(7, 1, 2)
    found = members.round()
    # The headers of replies are beside what is planned; they are not of the protocol of sums.
    headers = sum(len(packet.header) for packet in members.recorder.sent.values())
    assert 0 <= found.traffic.framing_up - 7 * planned.up < headers
    assert "7 members, of which 2 may be lost" in planned.line()
    assert planned.to_json()["floor"] == planned.floor
    plain = members.probe.config.model_copy(update={"secure_sum": False})
    assert plan.of(replace(members.probe.federation, config=plain)) is None


def test_updates_are_not_kept_and_gateways_are_no_members(members: Members) -> None:
    with pytest.raises(ConfigError, match="what secure-sum=true hides"):
        rules.refuse_kept_updates(members.probe.config)
    with pytest.raises(ConfigError, match="keys of their own"):
        replace(members.probe.federation, seats={"hub": 2})


def test_another_model_for_one_member_opens_nothing(members: Members) -> None:
    """Its context is its own: what it dealt does not open, and the sum is lost."""
    worker = members.probe.worker

    def begin(self: devices.Device, listing: Listing, task: bytes) -> None:
        changed = bytes(32) if self.owner.index == 0 else task
        devices.Device.begin(self, listing, changed)

    victim = worker.devices[EVERYONE[0]]
    victim.begin = begin.__get__(victim)  # type: ignore[method-assign]
    with pytest.raises(RoundError, match=f"{EVERYONE[0]} dealt fit nothing"):
        members.round()


@dataclass(frozen=True)
class Lying(Network):
    """A network whose tasks are changed on the way to all members but the first."""

    network: Network
    change: Callable[[Task], Task]

    def clients(self) -> Mapping[str, int]:
        return self.network.clients()

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        changed = {name: pack_task(self.change(unpack_task(own))) for name, own in packets.items()}
        yield from self.network.ask({**changed, EVERYONE[0]: packets[EVERYONE[0]]})


def _told(task: Task, key: str, value: object) -> Task:
    """A task with another of the settings beside those of the run."""
    return replace(task, config=json.dumps({**json.loads(task.config), key: value}))


def _flat(task: Task) -> Task:
    """A task with a scaling at which gradients are next to nothing."""
    return _told(task, "lora", {**json.loads(task.config)["lora"], "alpha": 1e-6})


def _row(task: Task) -> Task:
    """A task of a strategy with a log, which has one more row than it should."""
    assert task.log is not None
    row = seedlog.row(torch.ones(512, dtype=torch.float64), torch.float16)
    version, rows = seedlog.after(task.log.version, row), (*task.log.rows, row)
    return replace(task, log=replace(task.log, version=version, rows=rows, number=len(rows)))


def _sums(task: Task) -> Task:
    """A task whose sums, which are the model, are others."""
    sums = {name: tensor + 1 for name, tensor in task.scalars["sums"].items()}
    return replace(task, scalars={**task.scalars, "sums": sums})


LIES: Mapping[str, tuple[str, Callable[[Task], Task]]] = {
    "round": ("fedavg", lambda task: replace(task, round=2)),
    "scaling": ("fedavg", _flat),
    "population": ("fedavg", lambda task: _told(task, "population", 99)),
    "row": ("seed_pool", _row),
    "sums": ("fedkseed", _sums),
}


@pytest.mark.parametrize("lie", LIES)
def test_other_settings_for_all_but_one_member_open_nothing(tmp_path: Path, lie: str) -> None:
    """Else theirs could be updates of zeros, and the sum that of the one."""
    strategy, change = LIES[lie]
    probe = secure_sums.MemberProbe(strategy, "bert", tmp_path, {}, secure_sums.CHANGES)
    network = SecureNetwork(Lying(probe.network, change), probe.worker, 2, 1)
    cohort = dict.fromkeys(EVERYONE, 1)
    with pytest.raises(RoundError, match="0 members have answered for the sum, 5 are needed"):
        run_round(RoundCall(probe.federation, probe.fresh(), {}, 1, cohort=cohort), network)
    assert network.found is None
    assert len(probe.worker.seen) == len(EVERYONE), "all have trained"


def test_noise_is_put_on_a_sum_of_updates_that_are_no_longer_than_the_clip(
    tmp_path: Path,
) -> None:
    """With noise of zero a round is a plain one of dp=client, but for what rounding changes."""
    (tmp_path / "plain").mkdir()
    private = {"dp": "client", "noise_multiplier": 1.0, "clip": 0.05, "delta": 1e-3}
    plain = Probe("fedavg", "bert", tmp_path / "plain", {}, private)
    probe = secure_sums.MemberProbe(
        "fedavg", "bert", tmp_path / "sums", {}, {**secure_sums.CHANGES, **private}
    )
    network = SecureNetwork(probe.network, probe.worker, 2, 1)
    cohort, found = dict.fromkeys(EVERYONE, 1), list[RoundResult]()
    state = plain.fresh()
    for own, over in ((plain, plain.network), (probe, network)):
        level = ClientLevel(own.config, 7, 7, normal=lambda shape: torch.zeros(shape).double())
        call = RoundCall(own.federation, state, {}, 1, cohort=cohort)
        found.append(run_round(call, over, Spending(own.config, level)))
    exact, moved = (_moved(result.state["adapter"], state["adapter"]) for result in found)
    values = moved.numel()
    level_of = 0.05 / (2**23 - 1)
    assert 0 < float((moved - exact).norm()) < 2 * level_of * math.sqrt(7 * values) / 7
    for vector in probe.worker.seen.values():
        levels = vector.view(np.int32)[:values].astype(np.float64)
        assert np.linalg.norm(levels) * within(0.05, values) / (2**23 - 1) <= 0.05
        assert vector[values] == 1, "nobody weighs more"
    assert found[1].metrics.keys() == found[0].metrics.keys()
    assert found[1].memory.keys() == found[0].memory.keys()
    assert found[1].num_examples == {}
