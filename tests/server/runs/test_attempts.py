"""Rounds that fail, wait and gain members, on a tiny federation in this process."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from corolla.commands.simulate import in_process
from corolla.config.run import RunConfig
from corolla.errors import RoundError, StoppedError
from corolla.server.rounds import cohort
from corolla.server.runs import attempts, run
from corolla.server.runs.journal import read
from corolla.server.runs.observer import Silent
from corolla.server.runs.run import Run
from corolla.server.runs.summary import Summary
from corolla.wire.messages import Kind, unpack_task
from corolla.wire.packet import Packet

Settings = Callable[..., RunConfig]


@dataclass
class Watch(Silent):
    """An observer that remembers."""

    warnings: list[str] = field(default_factory=list)
    asked: list[tuple[int, str]] = field(default_factory=list)
    die_in: int = 0
    round: int = 0

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def round_started(self, round: int, cohort: int) -> None:
        self.round = round

    def replied(self, client: str) -> None:
        if self.round == self.die_in:
            raise KeyError("as if the process had been killed")
        self.asked.append((self.round, client))


@dataclass
class Weather:
    """Decides who is online and who answers; patches the network in this process."""

    silent: Callable[[int, str], bool] = lambda number, client: False
    offline: Callable[[str], bool] = lambda client: False
    asked: list[tuple[int, str]] = field(default_factory=list)


@pytest.fixture
def weather(monkeypatch: pytest.MonkeyPatch) -> Weather:
    found = Weather()
    network = in_process.InProcess
    real_ask, real_clients = network.ask, network.clients

    def ask(
        self: in_process.InProcess, packets: Mapping[str, Packet]
    ) -> Iterator[tuple[str, Packet | None]]:
        for client, packet in packets.items():
            task = unpack_task(packet)
            if task.kind == Kind.TRAIN:
                found.asked.append((task.round, client))
            if task.kind == Kind.TRAIN and found.silent(task.round, client):
                yield client, None
            else:
                yield from real_ask(self, {client: packet})

    def clients(self: in_process.InProcess) -> Mapping[str, int]:
        return {c: n for c, n in real_clients(self).items() if not found.offline(c)}

    monkeypatch.setattr(network, "ask", ask)
    monkeypatch.setattr(network, "clients", clients)
    monkeypatch.setattr(network, "online", lambda self: clients(self).keys())
    monkeypatch.setattr(attempts, "_POLL", 0.001)
    monkeypatch.setattr(run, "write_report", lambda path, info, lines: None)
    return found


def simulate(config: RunConfig, folder: Path, **options: Any) -> Summary:
    return in_process.simulate(config, folder, options.pop("observer", Watch()), **options)


def events(folder: Path, *names: str) -> list[Mapping[str, Any]]:
    return [entry for entry in read(folder) if not names or entry["event"] in names]


def test_a_plan_is_on_disk_before_anybody_is_asked(
    settings: Settings, tmp_path: Path, weather: Weather
) -> None:
    planned: list[list[Any]] = []

    def look(round: int, client: str) -> bool:
        planned.append([entry["cohort"] for entry in events(tmp_path / "out", "planned")])
        return False

    weather.silent = look
    simulate(settings(cohort=2, rounds=2), tmp_path / "out")
    cohorts = [entry["cohort"] for entry in events(tmp_path / "out", "planned")]
    assert len(cohorts) == 2
    assert planned == [cohorts[:1], cohorts[:1], cohorts, cohorts]
    names = [entry["event"] for entry in read(tmp_path / "out")]
    assert names == ["started", *["planned", "verdicts", "committed"] * 2, "done"]


def test_an_abandoned_round_is_tried_again_with_another_cohort(
    settings: Settings, tmp_path: Path, weather: Weather
) -> None:
    weather.silent = lambda number, client: (
        number == 2 and len(events(tmp_path / "out", "abandoned")) == 0
    )
    watch = Watch()
    simulate(settings(cohort=2), tmp_path / "out", observer=watch)
    plans = [e for e in events(tmp_path / "out", "planned") if e["round"] == 2]
    assert [plan["attempt"] for plan in plans] == [0, 1]
    assert plans[0]["cohort"] != plans[1]["cohort"]
    assert plans[0]["base_version"] == plans[1]["base_version"]
    (abandoned,) = events(tmp_path / "out", "abandoned")
    assert (abandoned["round"], abandoned["attempt"]) == (2, 0)
    assert "0 of 2 clients gave a valid update" in abandoned["why"]
    verdicts = [e["verdicts"] for e in events(tmp_path / "out", "verdicts") if e["round"] == 2]
    assert verdicts[0] == dict.fromkeys(plans[0]["cohort"], "no_answer")
    assert verdicts[1] == dict.fromkeys(plans[1]["cohort"], "accepted")
    assert [text for text in watch.warnings if "tried again" in text] == watch.warnings != []
    lines = [json.loads(s) for s in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("attempt", 0) for line in lines] == [0, 1, 0]
    assert [line["verdicts"] for line in lines] == [{"accepted": 2}] * 3


def test_an_abandoned_attempt_leaves_the_model_as_it_was(
    settings: Settings, tmp_path: Path, weather: Weather
) -> None:
    """The cohort is everybody: the second attempt ends where an undisturbed round does."""
    whole = simulate(settings(), tmp_path / "whole")
    weather.silent = lambda number, client: (
        number == 2 and client != "ada" and len(events(tmp_path / "out", "abandoned")) == 0
    )
    again = simulate(settings(), tmp_path / "out")
    assert len(events(tmp_path / "out", "abandoned")) == 1
    assert again.adapter_hash == whole.adapter_hash


def test_a_run_stops_after_its_attempts_and_goes_on_from_there(
    settings: Settings, tmp_path: Path, weather: Weather
) -> None:
    """All clients fail: the model stays, the run ends in one line, and can be resumed."""
    weather.silent = lambda number, client: number == 2
    with pytest.raises(RoundError) as caught:
        simulate(settings(attempts=2), tmp_path / "out")
    text = str(caught.value)
    assert "given up after 2 attempts; round 1 is kept: go on with --resume" in text
    assert [e["attempt"] for e in events(tmp_path / "out", "abandoned")] == [0, 1]
    assert read(tmp_path / "out")[-1]["event"] == "failed"
    assert [e["round"] for e in events(tmp_path / "out", "committed")] == [1]
    weather.silent = lambda number, client: False
    resumed = simulate(settings(attempts=2), tmp_path / "out", resume=True)
    plans = [e["attempt"] for e in events(tmp_path / "out", "planned") if e["round"] == 2]
    assert plans == [0, 1, 2]
    whole = simulate(settings(), tmp_path / "whole")
    assert resumed.adapter_hash == whole.adapter_hash


def test_a_round_under_way_asks_its_journalled_cohort_again(
    settings: Settings, tmp_path: Path, weather: Weather
) -> None:
    """Also where another one would be drawn now, because somebody has come back."""
    weather.offline = lambda client: client == "ben" and len(weather.asked) >= 2
    with pytest.raises(KeyError):
        simulate(settings(cohort=2), tmp_path / "out", observer=Watch(die_in=2))
    (plan,) = [e for e in events(tmp_path / "out", "planned") if e["round"] == 2]
    everybody = [e for e in weather.asked if e[0] == 2]
    assert {client for _, client in everybody} <= plan["cohort"].keys()
    drawn_now = cohort.sample(["ada", "ben", "cyd", "dot"], 2, settings().seed, 2)
    assert drawn_now != list(plan["cohort"])
    weather.offline = lambda client: False
    weather.asked.clear()
    simulate(settings(cohort=2), tmp_path / "out", resume=True)
    assert [c for r, c in weather.asked if r == 2] == list(plan["cohort"])
    assert [e for e in events(tmp_path / "out", "planned") if e["round"] == 2] == [plan]


def test_an_attempt_that_was_under_way_is_repeated_with_its_number(
    settings: Settings, tmp_path: Path, weather: Weather
) -> None:
    weather.silent = lambda number, client: (
        number == 2 and len(events(tmp_path / "whole", "abandoned")) == 0
    )
    whole = simulate(settings(cohort=2), tmp_path / "whole")
    weather.silent = lambda number, client: (
        number == 2 and len(events(tmp_path / "out", "abandoned")) == 0
    )
    dying = Watch()
    real = Watch.replied

    def replied(self: Watch, client: str) -> None:
        if events(tmp_path / "out", "abandoned"):
            raise KeyError("killed in the second attempt")
        real(self, client)

    dying.replied = replied.__get__(dying)  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        simulate(settings(cohort=2), tmp_path / "out", observer=dying)
    resumed = simulate(settings(cohort=2), tmp_path / "out", resume=True)
    assert resumed.adapter_hash == whole.adapter_hash
    plans = [e["attempt"] for e in events(tmp_path / "out", "planned") if e["round"] == 2]
    assert plans == [0, 1]


def test_a_run_pauses_while_too_few_are_online_and_goes_on(
    settings: Settings, tmp_path: Path, weather: Weather
) -> None:
    whole = simulate(settings(), tmp_path / "whole")
    weather.asked.clear()
    looks: list[int] = []

    def offline(client: str) -> bool:
        """From the second round on only `ada` is there, for a while."""
        looks.append(0)
        return len(weather.asked) >= 4 and client != "ada" and len(looks) < 200

    weather.offline = offline
    watch = Watch()
    found = simulate(settings(), tmp_path / "out", observer=watch)
    (paused,) = events(tmp_path / "out", "paused")
    assert (paused["round"], paused["online"], paused["needed"]) == (2, 1, 2)
    assert any("paused, 1 clients online, 2 are needed" in text for text in watch.warnings)
    assert found.adapter_hash == whole.adapter_hash


def test_a_pause_that_is_too_long_stops_the_run(
    settings: Settings, tmp_path: Path, weather: Weather
) -> None:
    weather.offline = lambda client: len(weather.asked) >= 4
    with pytest.raises(StoppedError) as caught:
        simulate(settings(wait=0.05), tmp_path / "out")
    assert "round 2: 0 clients are online, 2 are needed" in str(caught.value)
    assert "round 1 is kept: go on with --resume --out" in str(caught.value)
    assert [e["event"] for e in read(tmp_path / "out")][-2:] == ["paused", "stopped"]
    weather.offline = lambda client: False
    resumed = simulate(settings(wait=0.05), tmp_path / "out", resume=True)
    assert resumed.adapter_hash == simulate(settings(), tmp_path / "whole").adapter_hash


def test_no_wait_stops_at_once(settings: Settings, tmp_path: Path, weather: Weather) -> None:
    weather.offline = lambda client: len(weather.asked) >= 4
    with pytest.raises(StoppedError, match="0 clients are online"):
        simulate(settings(wait=0.0), tmp_path / "out")
    assert [e["event"] for e in read(tmp_path / "out")][-2:] == ["committed", "stopped"]


def test_members_that_come_later_stand_behind_the_others(
    settings: Settings, tmp_path: Path, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ada` would be first by name; ranks and classes of the others must not change."""
    weather.offline = lambda client: client == "ada" and len(weather.asked) < 3
    with pytest.raises(KeyError):
        simulate(settings(cohort=3), tmp_path / "out", observer=Watch(die_in=3))
    assert list(events(tmp_path / "out", "started")[0]["roster"]) == ["ben", "cyd", "dot"]
    (joined,) = events(tmp_path / "out", "joined")
    assert list(joined["roster"]) == ["ada"]
    weather.offline = lambda client: client == "dot"  # known, though not there now
    monkeypatch.setattr(attempts, "_BACK", 2.0)
    simulate(settings(cohort=3), tmp_path / "out", resume=True)
    (resumed,) = events(tmp_path / "out", "resumed")
    assert list(resumed["roster"]) == ["ben", "cyd", "dot", "ada"]


def test_time_in_an_earlier_process_counts(
    settings: Settings, tmp_path: Path, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed again and again still ends by max_seconds."""
    with pytest.raises(KeyError):
        simulate(settings(rounds=50, max_seconds=1e6), tmp_path / "out", observer=Watch(die_in=2))
    seconds = read(tmp_path / "out")[-1]["seconds"]
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    stored["config"]["max_seconds"] = seconds
    (tmp_path / "out" / "run.json").write_text(json.dumps(stored))
    config = settings(rounds=50, max_seconds=seconds)
    summary = simulate(config, tmp_path / "out", resume=True)
    assert summary.rounds == 1
    assert read(tmp_path / "out")[-1]["why"].endswith("are over")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"target_loss": 100.0}, "target-loss 100 reached"),
        ({"max_seconds": 1e-6}, "max-seconds 1e-06 are over"),
    ],
)
def test_a_run_that_ends_early_is_done_and_says_why(
    settings: Settings, tmp_path: Path, weather: Weather, changes: dict[str, float], why: str
) -> None:
    summary = simulate(settings(**changes), tmp_path / "out")
    assert summary.rounds == 1
    info = json.loads((tmp_path / "out" / "run.json").read_text())
    assert info["status"] == "done"
    assert info["ended"].startswith(why)
    assert (tmp_path / "out" / "adapter").is_dir()
    again = simulate(settings(**changes), tmp_path / "out", resume=True)
    assert (again.rounds, again.adapter_hash) == (1, summary.adapter_hash)
    assert [e["why"] for e in events(tmp_path / "out", "done")] == [info["ended"]] * 2


def test_a_full_run_says_that_all_rounds_are_done(
    settings: Settings, tmp_path: Path, weather: Weather
) -> None:
    simulate(settings(rounds=1), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["ended"] == "all 1 rounds"


def test_devices_that_may_still_join_are_waited_for(
    settings: Settings, tmp_path: Path, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulation refuses a cohort that can never be; on devices it is a pause."""
    monkeypatch.setattr(in_process, "Run", partial(Run, own_devices=True))
    watch = Watch()
    with pytest.raises(StoppedError, match="round 1: 4 clients are online, 5 are needed"):
        simulate(settings(cohort=9, wait=0.02), tmp_path / "out", observer=watch)
    assert any("paused" in text for text in watch.warnings)
    assert weather.asked == []


def test_devices_that_separation_bars_are_no_end(
    settings: Settings, tmp_path: Path, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When others have joined they may take part again: until then it is a pause."""
    monkeypatch.setattr(in_process, "Run", partial(Run, own_devices=True))
    private = {"dp": "client", "noise_multiplier": 4.0, "separation": 2}
    watch = Watch()
    with pytest.raises(StoppedError, match="round 2: 0 clients that may take part are online, 2"):
        simulate(settings(wait=0.02, **private), tmp_path / "out", observer=watch)
    assert any("round 2: paused, 0 clients that may take part" in text for text in watch.warnings)
    assert [entry["round"] for entry in events(tmp_path / "out", "committed")] == [1]


def test_a_member_that_the_run_cannot_take_is_left_out_and_never_journalled(
    settings: Settings, tmp_path: Path, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway comes to a run that takes none, with a name like a client's before its phones."""
    late = {"gate": 4, "zoe": 4}

    def clients(self: in_process.InProcess) -> Mapping[str, int]:
        found = {"ada": 8, "ben": 8, "cyd": 8, "dot": 8}
        return {**found, **late} if weather.asked else found

    network = in_process.InProcess
    monkeypatch.setattr(network, "clients", clients)
    monkeypatch.setattr(network, "online", lambda self: clients(self).keys() - {"zoe"})
    monkeypatch.setattr(
        network, "seats", lambda self: {"gate": 3} if weather.asked else {}, raising=False
    )
    watch = Watch()
    config = settings(selection="weighted", cohort=4, eval_every=9)
    simulate(config, tmp_path / "out", observer=watch)
    said = [text for text in watch.warnings if text.startswith("left out: selection=weighted")]
    assert 1 <= len(said) <= config.rounds
    joined = events(tmp_path / "out", "joined")
    assert [list(entry["roster"]) for entry in joined] == [["zoe"]]
    assert all("gate" not in entry["seats"] for entry in joined)
    assert events(tmp_path / "out")[-1]["event"] == "done"
