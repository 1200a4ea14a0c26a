"""What the owner of a native phone can mend is told in one line; the real gateway answers here."""

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from corolla.host import certificates
from corolla.wire import messages
from tests.client.native.fake_gateway import Line
from tests.client.native.phones import World, a_task
from tests.server.gateway import gateways

LINE = "error: {}\n"


@pytest.fixture
def real(offered: World) -> Iterator[gateways.World]:
    """The gateway of `corolla gateway`, beside the fake one; it has no bundle to offer."""
    with gateways.serving(offered.folder) as found:
        offered.address = found.address
        yield found


@pytest.fixture
def broken(offered: World) -> World:
    """Files that are not what they should be."""
    certificates.make(offered.folder / "others", [])
    (offered.folder / "wrong").write_text("a-token-of-nobody-at-all")
    (offered.folder / "two").write_text("one two")
    (offered.folder / "empty").write_text("")
    (offered.folder / "bad.jsonl").write_text('{"after": 0}\n{"charging": maybe}\n')
    return offered


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("gateway", None, "--gateway is missing: see corolla-phone --help"),
        ("gateway", "https://localhost:9", "--gateway: expected HOST:PORT, without https://"),
        ("gateway", "localhost", "--gateway: expected HOST:PORT"),
        ("gateway", "localhost:99999", "--gateway: expected HOST:PORT"),
        ("gateway", "localhost:", "--gateway: expected HOST:PORT"),
        ("token_file", "none", "--token-file: cannot read none"),
        ("token_file", "$two", "holds no token: one line"),
        ("token_file", "$empty", "holds no token: one line"),
        ("root_certificates", "none", "--root-certificates: cannot read none"),
        ("publisher", "none", "--publisher: cannot read none"),
        ("publisher", None, "--publisher is missing"),
        ("data", "none", "--data: cannot read none"),
        ("name", "a/b", "--name: a device's name has 1 to 64 characters"),
        ("memory", "much", "--memory: expected bytes, such as 200MB, found"),
        ("memory", "2 parsecs", "--memory: expected bytes"),
        ("methods", "grad,magic", "--methods: expected grad, loss or both; found 'magic'"),
        ("length", "-1", "--length: expected a number, found '-1'"),
        ("rounds", "1.5", "--rounds: expected a whole number"),
        ("platform", "windows", "--platform: expected linux or script:FILE, found 'windows'"),
        ("platform", "script:none", "--platform: cannot read none"),
        ("platform", "script:$bad.jsonl", 'bad.jsonl, line 2: expected {"after": seconds'),
        ("daily_seconds", "nan", "--daily-seconds: expected a number"),
        ("retry_seconds", "5", "--retry-seconds: expected FIRST,LONGEST in seconds"),
        ("state", "/proc/none", "--state: cannot make the folder /proc/none"),
        ("colour", "red", "there is no option --colour: see corolla-phone --help"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(
    broken: World, option: str, value: str | None, words: str
) -> None:
    told = value.replace("$", f"{broken.folder}/") if value else value
    phone = broken.start(once=True, **{option: told})
    assert phone.finish() == 2, phone.lines
    assert phone.errors.startswith("error: ")
    assert words in phone.errors
    assert phone.errors.count("\n") == 1
    assert not broken.fake.asked


def test_words_that_are_no_options_are_told_in_one_line(native_build: Path) -> None:
    def said(*words: str) -> tuple[int, str]:
        command = [str(native_build / "corolla-phone-stub"), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert said("--gateway") == (2, LINE.format("--gateway needs a value"))
    assert said("dance") == (2, LINE.format("there is no command dance: see corolla-phone --help"))
    assert said("--once=1") == (
        2,
        LINE.format("there is no option --once=1: see corolla-phone --help"),
    )


def test_a_name_is_made_once(offered: World) -> None:
    for _ in range(2):
        assert offered.start(once=True, name=None, state=offered.state()).finish() == 0
    names = {r.device for name, r in offered.fake.asked if name == "CheckIn"}
    (name,) = names
    assert name.startswith("phone-")
    assert len(name) == len("phone-") + 16


def test_two_phones_do_not_share_a_state(offered: World) -> None:
    first = offered.start()
    first.says("waiting: no round")
    second = offered.start()
    assert second.finish() == 2
    assert "another corolla-phone is at work in" in second.errors


def test_a_publisher_that_is_no_key_refuses_all_bundles(offered: World) -> None:
    phone = offered.start(once=True, publisher=offered.folder / "certs" / "ca.pem")
    assert phone.finish() == 1
    assert "is no public key of Ed25519 (PEM)" in phone.errors
    assert phone.errors.count("\n") == 1


# --- the real gateway -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("token_file", "wrong", "the gateway refuses: this gateway does not know the token"),
        (
            "root_certificates",
            "others/ca.pem",
            "the gateway's certificate is not signed by --root-certificates, or is of another "
            "host or time",
        ),
    ],
)
def test_what_only_the_owner_can_mend_ends_the_phone(
    broken: World, real: gateways.World, option: str, value: str, words: str
) -> None:
    phone = broken.start(**{option: broken.folder / value})
    assert phone.finish() == 2, phone.lines
    assert phone.errors == LINE.format(words)


def test_a_gateway_of_another_name_is_not_believed(offered: World, real: gateways.World) -> None:
    """Its certificate is of localhost, also as 127.0.0.1."""
    line = Line(int(real.address.rpartition(":")[2]), "127.0.0.3")
    phone = offered.start(once=True, gateway=f"127.0.0.3:{line.port}")
    assert phone.finish() == 2, phone.lines
    line.close()
    assert "or is of another host or time" in phone.errors


def test_a_gateway_without_a_bundle_is_asked_again_later(
    offered: World, real: gateways.World
) -> None:
    phone = offered.start(once=True)
    assert phone.finish() == 0, phone.errors
    assert phone.lines[-1].startswith("waiting: ")
    assert len(phone.lines) == 2
    assert "p1" in real.gateway.roster.seen


def test_a_gateway_of_another_protocol_ends_the_phone(
    offered: World, real: gateways.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corolla.phones.protocol.PROTOCOL", 2)
    phone = offered.start()
    assert phone.finish() == 2
    assert phone.errors == LINE.format("the gateway refuses: this gateway speaks version 2, not 1")


def test_a_name_that_is_taken_is_asked_for_again_later(
    offered: World, real: gateways.World
) -> None:
    (offered.folder / "token").write_text(gateways.OTHER)  # of the device p9 alone
    phone = offered.start(once=True)
    assert phone.finish() == 0
    assert phone.lines[-1] == "waiting: this token is of device 'p9'"


def test_a_real_round(offered: World, tmp_path: Path) -> None:
    """A bundle of the fake's, offered by the real gateway: it judges what the phone uploads."""
    task = a_task()
    (offered.folder / "payload").write_bytes(gateways.update_of(task, "gate/p1").payload)
    replies: list[messages.Reply] = []
    with gateways.serving(tmp_path / "real", seats=1, share_bundle=offered.bundle) as world:

        def ask() -> None:
            packet = world.gateway.answer(messages.pack_task(task))
            replies.append(messages.unpack_reply(packet, len(packet.payload)))

        asking = threading.Thread(target=ask)
        asking.start()
        phone = offered.start(
            {"payload": str(offered.folder / "payload")},
            rounds=1,
            gateway=world.address,
            root_certificates=tmp_path / "real" / "certs" / "ca.pem",
        )
        assert phone.finish() == 0, phone.lines
        asking.join(60)
    assert phone.lines[-1] == "round 1 as gate/p1: accepted"
    assert replies[0].clients == 1
    (asked,) = offered.answers()
    assert asked["program"] == "fp32"
    assert json.loads((offered.state() / "history.jsonl").read_text().splitlines()[-1])["accepted"]
