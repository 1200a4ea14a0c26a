"""Rounds whose updates go to secure sums: exact, silent about members, and refused in time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from corolla.commands.check import secure_sums
from corolla.commands.check.probe import Probe, Recorder
from corolla.commands.check.tables import CLIENTS
from corolla.commands.plan import secure as plan
from corolla.commands.simulate import secure
from corolla.config.build import build_strategy
from corolla.config.load import load
from corolla.config.sums import not_summed
from corolla.errors import ConfigError, RoundError
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
from corolla.sums.quantise import Quantiser
from corolla.types import Params
from corolla.wire.messages import Kind, pack_task, unpack_reply
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
        ("dp=client epsilon=8", "no noise is put on an opened sum yet"),
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
    assert "7 members, 2 may be lost" in planned.line()
    assert planned.to_json()["floor"] == planned.floor
    plain = members.probe.config.model_copy(update={"secure_sum": False})
    assert plan.of(replace(members.probe.federation, config=plain)) is None
