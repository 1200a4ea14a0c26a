"""What is asked of a device: judged on the device, as the cases say that Python judges it too."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from corolla.proto import device_pb2 as pb
from tests.client.native.fake_gateway import make_bundle
from tests.client.native.phones import FILES, World, a_task
from tests.server.gateway import gateways

CASES = Path(__file__).parents[2] / "policy_cases.json"
LONG = {"passes": 100_000}


def stub(build: Path, *words: object) -> list[Any]:
    command = [str(word) for word in (build / "corolla-phone-stub", *words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_policies_are_judged_as_the_cases_say(native_build: Path) -> None:
    cases = json.loads(CASES.read_text())["cases"]
    wanted = [{"name": case["name"], "found": case["expected"]} for case in cases]
    found = stub(native_build, "policies", CASES)
    assert [one for one in zip(found, wanted, strict=True) if one[0] != one[1]] == []
    assert len(found) > 30


# --- before a check-in ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "device", "words"),
    [
        ({"charging": True}, {"charging": False}, "not charging"),
        ({"unmetered": True}, {"metered": True}, "not on an unmetered network"),
        ({"idle": True}, {"idle": False}, "not idle"),
        ({"battery_percent": 20}, {"charging": False, "battery_percent": 9}, "the battery is low"),
        ({"thermal": 3}, {"thermal": 4}, "too warm"),
        ({"storage_bytes": 9000}, {"storage_bytes": 8999}, "too little storage is free"),
        ({"examples": 10}, {}, "too few examples"),
    ],
)
def test_a_phone_waits_until_it_meets_the_policy(
    offered: World, policy: dict[str, Any], device: dict[str, Any], words: str
) -> None:
    """It learns the policy with the first answer; then it does not call, and says why once."""
    offered.fake.policy = pb.Policy(**policy)
    room = {"storage_bytes": 1 << 40}
    senses = offered.script("senses", [{"after": 0, **room}])
    phone = offered.start(platform=f"script:{senses}")
    phone.says("waiting: no round" if "examples" not in policy else words)
    offered.script("senses", [{"after": 0, **room, **device}])
    phone.says(f"waiting: {words}")
    time.sleep(0.3)
    offered.fake.asked.clear()
    time.sleep(0.5)
    assert not offered.fake.asked
    assert phone.lines.count(f"waiting: {words}") == 1
    if device:
        offered.script("senses", [{"after": 0, **room}])
        gateways.until(lambda: offered.fake.count("CheckIn"))


def test_a_policy_is_known_to_the_next_process(offered: World) -> None:
    offered.fake.policy = pb.Policy(charging=True)
    assert offered.start(once=True).finish() == 0
    offered.fake.asked.clear()
    unplugged = offered.script("unplugged", [{"after": 0, "charging": False}])
    phone = offered.start(once=True, platform=f"script:{unplugged}")
    assert phone.finish() == 0
    assert phone.lines[1:] == ["waiting: not charging"]
    assert not offered.fake.asked


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"daily_bytes": "1MB"}, "today's bytes are used up"),
        ({"daily_seconds": "0.01"}, "today's time is used up"),
    ],
)
def test_the_limits_of_its_owner_count_as_those_of_the_gateway(
    offered: World, option: dict[str, str], words: str
) -> None:
    offered.fake.tasks = [a_task(), a_task(2)]
    phone = offered.start({"passes": 20}, **option)
    phone.says(f"waiting: {words}")
    assert len(offered.fake.reports) <= 1
    phone.kill()
    again = offered.start(once=True, **option)
    assert again.finish() == 0
    assert again.lines[1:] == [f"waiting: {words}"]


# --- with a lease ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"separation": 3}, "policy: it contributed a few rounds ago"),
        ({"period_seconds": 3600.0}, "policy: it contributed a short time ago"),
    ],
)
def test_a_task_that_comes_too_soon_is_given_up_without_training(
    offered: World, policy: dict[str, Any], words: str
) -> None:
    offered.fake.policy = pb.Policy(**policy)
    offered.fake.tasks = [a_task(1), a_task(3)]
    offered.start()
    gateways.until(lambda: len(offered.fake.reports) == 2)
    assert [reply.error for _, reply in offered.fake.reports] == ["", words]
    assert len(offered.answers()) == 1


def test_a_contribution_of_long_ago_does_not_count(offered: World) -> None:
    offered.fake.policy = pb.Policy(separation=3)
    offered.fake.tasks = [a_task(1), a_task(4)]
    phone = offered.start(rounds=2)
    assert phone.finish() == 0, phone.errors


# --- while it trains ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "device", "words"),
    [
        ({"charging": True}, {"charging": False}, "not charging any more"),
        ({"unmetered": True}, {"metered": True}, "not on an unmetered network any more"),
        ({"idle": True}, {"idle": False}, "not idle any more"),
        ({"thermal": 2}, {"thermal": 3}, "too warm"),
    ],
)
def test_a_phone_rests_while_a_condition_does_not_hold(
    offered: World, policy: dict[str, Any], device: dict[str, Any], words: str
) -> None:
    """It stops within a look and a pass, keeps its lease, and goes on from its checkpoint."""
    offered.fake.policy = pb.Policy(**policy)
    offered.fake.tasks = [a_task()]
    offered.fake.lease_seconds = 3.0
    senses = offered.script("senses", [{"after": 0}])
    started = time.monotonic()
    phone = offered.start({"passes": 9999, "seconds": 0.02}, rounds=1, platform=f"script:{senses}")
    passes = offered.state() / "passes"
    gateways.until(passes.exists)
    offered.script("senses", [{"after": 0, **device}])
    phone.says(f"waiting: {words}")
    done, rested = passes.read_text(), time.monotonic()
    time.sleep(1.2)
    assert passes.read_text() == done
    rest = time.monotonic() - rested
    offered.script("stub-0", {"passes": int(done) + 20, "seconds": 0.02})
    offered.script("senses", [{"after": 0}])
    assert phone.finish() == 0, phone.errors
    lived = time.monotonic() - started
    assert "going on" in phone.lines
    first, second = offered.answers()
    assert (first["from"], second["from"]) == (0, int(done))
    assert offered.fake.count("Heartbeat") >= 2
    ((_, reply),) = offered.fake.reports
    assert reply.metrics["device_thermal_max"] == device.get("thermal", 0)
    (line,) = [line for line in offered.history() if line["run"]]
    assert line["seconds"] < lived - rest  # rests are no work


def test_a_condition_that_does_not_come_back_ends_the_task(offered: World) -> None:
    offered.fake.policy = pb.Policy(charging=True)
    offered.fake.tasks = [a_task()]
    offered.fake.lease_seconds = 1.2
    senses = [{"after": 0}, {"after": 1.5, "charging": False, "battery_percent": 90}]
    script = offered.script("senses", senses)
    phone = offered.start(LONG, platform=f"script:{script}")
    gateways.until(lambda: offered.fake.reports)
    ((_, reply),) = offered.fake.reports
    assert reply.error == "given up: not charging any more"
    phone.says("waiting: not charging")
    gateways.until(lambda: len(offered.history()) == 2)
    (line,) = [line for line in offered.history() if line["run"]]
    assert (line["accepted"], line["battery"]) == (False, 10)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"daily_seconds": 1.0}, "given up: today's time is used up"),
        ({"daily_battery_percent": 5.0}, "given up: today's charge is used up"),
    ],
)
def test_a_limit_of_a_day_ends_the_task_at_once(
    offered: World, policy: dict[str, Any], words: str
) -> None:
    offered.fake.policy = pb.Policy(**policy)
    offered.fake.tasks = [a_task()]
    drain = [
        {"after": 0, "charging": False, "battery_percent": 80},
        {"after": 1.5, "charging": False, "battery_percent": 75},
    ]
    offered.start(LONG, platform=f"script:{offered.script('drain', drain)}")
    gateways.until(lambda: offered.fake.reports)
    assert offered.fake.reports[0][1].error == words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_work_that_a_signal_ends_counts_against_the_limits_of_a_day(
    offered: World, number: signal.Signals
) -> None:
    offered.fake.tasks = [a_task()]
    phone = offered.start(LONG, daily_seconds=5)
    record = offered.state() / "session.json"
    gateways.until(lambda: record.exists() and json.loads(record.read_text())["seconds"] > 2)
    phone.process.send_signal(number)
    phone.finish()
    again = offered.start(LONG, daily_seconds=5)
    again.says("not accepted: given up: today's time is used up")
    worked = [line["seconds"] for line in offered.history() if line["run"]]
    assert len(worked) == 2
    assert worked[1] < 5 <= sum(line["seconds"] for line in offered.history())


def test_an_update_waits_for_an_unmetered_network(offered: World) -> None:
    """It is there when the line becomes metered, after the last look of the training."""
    offered.fake.policy = pb.Policy(unmetered=True)
    offered.fake.tasks = [a_task()]
    offered.fake.lease_seconds = 0.9
    payload = offered.folder / "payload"
    payload.write_bytes(bytes(1000))
    senses = offered.script("senses", [{"after": 0}])
    stub = {"passes": 2, "seconds": 0.4, "payload": str(payload)}
    phone = offered.start(stub, rounds=1, platform=f"script:{senses}")
    passes = offered.state() / "passes"
    gateways.until(lambda: passes.exists() and passes.read_text() == "1")
    time.sleep(0.1)
    offered.script("senses", [{"after": 0, "metered": True}])
    phone.says("waiting: not on an unmetered network")
    before = offered.fake.count("Heartbeat")
    gateways.until(lambda: offered.fake.count("Heartbeat") > before + 2)
    assert not offered.fake.count("Upload")
    offered.script("senses", [{"after": 0}])
    assert phone.finish() == 0, phone.errors
    assert phone.lines[-1] == "round 1 as gate/p1: accepted"


# --- what its owner allows ------------------------------------------------------------------------


def planned(world: World, tokens: dict[str, int]) -> None:
    """Offer a bundle whose program has these plans of memory."""
    method = {"file": "fp32.pte", "planned": tokens}
    program = {"name": "fp32", "base": "fp32", "files": sorted(FILES), "eps": [1e-4, 1e-2]}
    programs = [{**program, "methods": {"grad": method}}]
    bundle = make_bundle(world.folder / "planned", FILES, world.key, programs=programs)
    world.fake.bundle = bundle
    world.fake.share(bundle)


def test_a_method_that_its_owner_leaves_out_is_not_used(offered: World) -> None:
    offered.fake.tasks = [a_task()]
    phone = offered.start(methods="loss")
    phone.says("not accepted: this device does not train with grad")
    assert not offered.answers()


def test_sequences_are_as_long_as_the_memory_of_its_owner_allows(offered: World) -> None:
    planned(offered, {"8": 1_000_000, "16": 2_000_000, "32": 4_000_000})
    offered.fake.tasks = [a_task()]
    phone = offered.start(rounds=1, memory="3MB")
    assert phone.finish() == 0, phone.errors
    assert [asked["length"] for asked in offered.answers()] == [16]


def test_a_program_that_needs_more_memory_is_not_used(offered: World) -> None:
    planned(offered, {"16": 2_000_000, "32": 4_000_000})
    offered.fake.tasks = [a_task()]
    phone = offered.start(memory="1MB")
    phone.says("this device has 1 MB of memory, too little for fp32 with grad")
    assert not offered.answers()


# --- what is kept ---------------------------------------------------------------------------------


def test_a_history_forgets_after_30_days_and_does_not_grow_for_ever(
    native_build: Path, tmp_path: Path
) -> None:
    path = tmp_path / "history.jsonl"
    usual = {"run": "a" * 32, "round": 1, "seconds": 1.0, "bytes": 1.0, "battery": 0.0}
    now = time.time()
    old = [{"at": now - 30 * 86400 - 5, **usual, "accepted": True}]
    young = [{"at": now - 30 * 86400 + 600, **usual, "accepted": True}]
    text = "".join(json.dumps(line) + "\n" for line in old + young)
    path.write_text("half a li\n" + text + '{"at": 1}\n[]\n')
    assert stub(native_build, "history", path, 1) == [2]
    assert path.read_text().count("\n") == 3  # dropped by bytes alone: the clock may be wrong
    line = json.dumps(young[0]) + "\n"
    path.write_text(line * (3 * (1 << 20) // len(line)))
    (kept,) = stub(native_build, "history", path, 2)
    assert path.stat().st_size <= (1 << 20) + 400
    assert kept > 5000


def test_linux_tells_what_it_can(native_build: Path, tmp_path: Path) -> None:
    (found,) = stub(native_build, "senses", tmp_path)
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < found["memory_bytes"] <= int(facts["MemTotal"].split()[0]) * 1024
    assert found["storage_bytes"] > 0
    assert 0 <= found["battery_percent"] <= 100
    assert found["thermal"] in range(7)
