"""What a gateway and its runs may take of a phone's disk, and what goes before it is refused."""

from pathlib import Path

import pytest

from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from tests.client.native.fake_gateway import make_bundle
from tests.client.native.phones import FILES, World, a_task

RUN, OTHER = "0" * 32, "9" * 32
GROUP, OLD = "12" * 16, "34" * 16


def offer(world: World, size: int) -> None:
    """A task with a cached group of that many bytes; the phone has the bundle."""
    assert world.start(once=True).finish() == 0
    blob = world.fake.put(bytes(size))
    world.fake.cached = [pb.Blob(sha256=blob.sha256, size=size, group="A", content=GROUP)]
    world.fake.tasks = [a_task(cached={"A": GROUP})]
    world.fake.asked.clear()


def asked_for(world: World) -> bool:
    """Whether the phone has asked for the group."""
    (group,) = world.fake.cached
    return any(
        name == "Download" and request.sha256 == group.sha256 for name, request in world.fake.asked
    )


def kept(world: World, run: str, content: str, size: int) -> Path:
    """A group that lies on the phone's disk."""
    path = world.state() / "runs" / run / f"{content}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def test_a_run_that_would_keep_too_much_is_refused_before_a_byte_of_it_comes(
    offered: World,
) -> None:
    offer(offered, 900_000)
    phone = offered.start(once=True, run_disk="500KB")
    assert phone.finish() == 0, phone.errors
    why = "the run would keep 900 kB on this device's disk, its owner allows 500 kB (--run-disk)"
    ((_, reply),) = offered.fake.reports
    assert reply.error == why
    assert phone.lines[1] == why
    assert not asked_for(offered)


def test_runs_and_bundles_together_have_a_limit(offered: World) -> None:
    offer(offered, 900_000)
    phone = offered.start(once=True, disk="4MB")
    assert phone.finish() == 0, phone.errors
    ((_, reply),) = offered.fake.reports
    assert reply.error == (
        "the run and the bundle would keep 4 MB on this device's disk, "
        "its owner allows 4 MB (--disk)"
    )
    assert not asked_for(offered)


def test_what_no_task_names_any_more_goes_before_it_is_counted(offered: World) -> None:
    offer(offered, 300_000)
    others = [kept(offered, OTHER, GROUP, 400_000), kept(offered, RUN, OLD, 400_000)]
    named = kept(offered, RUN, GROUP, 300_000)
    phone = offered.start(once=True, run_disk="500KB")
    assert phone.finish() == 0, phone.errors
    assert phone.lines[1] == "round 1 as gate/p1: accepted"
    assert asked_for(offered)  # the stub holds nothing
    assert [path.exists() for path in (*others, named)] == [False, False, True]


def test_a_bundle_that_is_larger_than_the_limit_is_refused(offered: World) -> None:
    offered.fake.asked.clear()
    phone = offered.start(once=True, disk="2MB")
    assert phone.finish() == 1
    assert phone.errors == (
        "error: the gateway's bundle is refused: it needs 3 MB more on this device's disk, "
        "its owner allows 2 MB (--disk)\n"
    )
    assert not offered.fake.downloads(offered.bundle / "base.ptd")


def test_runs_and_the_old_bundle_make_room_for_a_new_one(offered: World) -> None:
    assert offered.start(once=True).finish() == 0
    old = offered.installed("base.ptd")
    run = kept(offered, RUN, GROUP, protocol.CHUNK)
    files = {name: bytes(len(data)) for name, data in FILES.items()}
    bundle = make_bundle(offered.folder / "newer", files, offered.key)
    offered.fake.bundle = bundle
    offered.fake.share(bundle)
    phone = offered.start(once=True, disk="5MB")
    assert phone.finish() == 0, phone.errors
    assert offered.installed("base.ptd").read_bytes() == files["base.ptd"]
    assert not run.exists()
    assert not old.exists()


@pytest.mark.parametrize("option", ["run_disk", "disk"])
def test_a_limit_is_a_size(offered: World, option: str) -> None:
    phone = offered.start(once=True, **{option: "much"})
    assert phone.finish() == 2
    name = option.replace("_", "-")
    assert phone.errors.startswith(f"error: --{name}: expected bytes, such as 200MB, found")
