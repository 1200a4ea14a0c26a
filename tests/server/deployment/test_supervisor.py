"""What `corolla server` refuses before anything starts, in one line each; keys and outcomes."""

import errno
import io
import json
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from flwr.cli.build import build_fab_from_files

from corolla.config.load import load
from corolla.errors import ConfigError, RoundError
from corolla.host import certificates
from corolla.server import app
from corolla.server.deployment import superlink, supervisor
from corolla.server.deployment.order import OUTCOME, PROCESS, Outcome, Settings
from corolla.server.deployment.supervisor import Supervisor, begin
from tests.e2e.federation import make_key


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    certificates.make(tmp_path / "certs", [])
    return tmp_path / "certs"


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield f"127.0.0.1:{held.getsockname()[1]}"


def refused(folder: Path, settings: Settings, resume: bool = False, **options: Any) -> str:
    """What is said, in one line, before a process is started."""
    config = load(None, options)
    with pytest.raises(ConfigError) as caught:
        begin(config, folder, settings, keep_updates=False, resume=resume, say=print)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_mistake_is_one_line_and_leaves_no_run_behind(
    tmp_path: Path, tls: Path, taken: str
) -> None:
    out = tmp_path / "out"
    good = Settings(address="127.0.0.1:0", certs=tls)
    assert "--certs DIR is missing" in refused(out, Settings())
    assert "cannot read" in refused(out, Settings(certs=tmp_path / "nowhere"))
    keys = good.model_copy(update={"clients_keys": tmp_path / "none"})
    assert "is no folder" in refused(out, keys)
    assert "use corolla simulate" in refused(out, good, step_seconds=1.0)
    assert "nothing to resume" in refused(out, good, resume=True)
    assert "Address already in use" in refused(out, Settings(address=taken, certs=tls))
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file", good)
    assert "is not empty" in refused(tmp_path, good)


def test_another_release_of_flower_is_refused(
    tmp_path: Path, tls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    superlink.check_version()
    for found in ("1.42.0", "1.4.1", "2.0"):
        monkeypatch.setattr(superlink, "version", lambda _, found=found: found)
        said = refused(tmp_path / "out", Settings(certs=tls))
        assert (
            said == f"flwr {found} is installed, the server needs 1.41: pip install 'flwr==1.41.*'"
        )


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own
def test_the_bundle_imports_what_is_installed_and_names_no_path() -> None:
    files = {name: text.encode() for name, text in superlink._BUNDLE.items()}
    content, _ = build_fab_from_files(files)
    with zipfile.ZipFile(io.BytesIO(content)) as bundle:
        names = set(bundle.namelist())
        text = b"".join(bundle.read(name) for name in names)
    assert {"server_app.py", "client_app.py", "pyproject.toml"} <= names
    assert len(content) < 10_000
    assert str(Path.home()).encode() not in text
    assert b"from corolla.client.device.relay import app" in text


class Registry:
    """In place of the SuperLink's list of keys; `away`: it does not answer."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.away = False

    def register(self, pem: bytes) -> bool:
        if self.away:
            raise httpx.ConnectError("away")
        self.keys.append(pem)
        return True


def test_keys_are_registered_once_when_they_come_and_again_when_they_change(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    keys = tmp_path / "keys"
    keys.mkdir()
    made = Supervisor(tmp_path, Settings(clients_keys=keys), said.append)
    registry: Any = Registry()
    make_key(tmp_path, "a", keys)
    (keys / "bad.pub").write_text("hello")
    (keys / "note.txt").write_text("not looked at")
    for _ in range(3):
        made._register(registry)
    assert registry.keys == [certificates.public_key(keys / "a.pub")]
    assert [line.split(":")[0] for line in said] == ["left out"]
    make_key(tmp_path, "b", keys)
    registry.away = True
    with pytest.raises(httpx.ConnectError):
        made._register(registry)
    registry.away = False
    made._register(registry)
    assert registry.keys[1:] == [certificates.public_key(keys / "b.pub")]


def test_what_a_serverapp_says_ends_the_server_or_not(tmp_path: Path) -> None:
    (tmp_path / "flower").mkdir()
    made = Supervisor(tmp_path, Settings(), print)
    assert not made._ended()
    Outcome("stopped", "by whoever", 1).write(tmp_path)
    assert not made._ended()
    Outcome("done").write(tmp_path)
    assert made._ended()
    Outcome("failed", "wrong", 2).write(tmp_path)
    with pytest.raises(ConfigError, match="wrong"):
        made._ended()
    Outcome("failed", "too few", 1).write(tmp_path)
    with pytest.raises(RoundError, match="too few"):
        made._ended()


def test_on_a_full_disk_the_one_line_of_the_serverapp_is_what_ends_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "flower").mkdir()
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "superexec.log"
    log.write_text("corolla failed: of an earlier one\n")
    made = Supervisor(tmp_path, Settings(), print)

    class Control:
        def submit(self) -> int:
            return 1

        def status(self, run: int) -> tuple[str, str]:
            return "running", ""

    control: Any = Control()
    made._submit(control)
    assert made._last_words() == ""
    (tmp_path / OUTCOME).with_name(OUTCOME.name + ".part").symlink_to("/dev/full")
    app._leave(Outcome("failed", "the disk\nis full", 1), tmp_path)
    said = capsys.readouterr().err
    with log.open("a") as file:
        file.write(said + "Flower's own words\n")
    (tmp_path / PROCESS).write_text("{}")  # it was there, and is no more
    with pytest.raises(RoundError, match=r"^the disk is full"):
        made._given_up(control, 1)


def test_a_serverapp_that_never_begins_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Supervisor(tmp_path, Settings(), print)

    class Control:
        def submit(self) -> int:
            return 1

        def status(self, run: int) -> tuple[str, str]:
            return "pending", ""

    control: Any = Control()
    made._submit(control)
    assert made._given_up(control, 1) == ""
    monkeypatch.setattr(supervisor, "_BEGIN", -1.0)
    assert "has not begun" in made._given_up(control, 1)


def test_a_folder_of_keys_that_cannot_be_listed_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    keys = tmp_path / "keys"
    keys.mkdir()
    made = Supervisor(tmp_path, Settings(clients_keys=keys), said.append)
    registry: Any = Registry()
    make_key(tmp_path, "a", keys)

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    for name in ("glob", "read_bytes"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, refuse)
            for _ in range(2):
                made._register(registry)
    assert len(said) == 2
    assert registry.keys == []
    made._register(registry)  # what could not be read then is not left out for good
    assert len(registry.keys) == 1


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own
@pytest.mark.parametrize(("status", "raised"), [(503, httpx.HTTPStatusError), (400, RoundError)])
def test_a_fault_of_the_superlink_is_tried_again_and_its_answer_is_final(
    status: int, raised: type[Exception]
) -> None:
    request = httpx.Request("POST", "https://127.0.0.1/")
    answer = httpx.Response(status, text="no", request=request)

    class Client:
        def refuse(self, _: object) -> NoReturn:
            answer.raise_for_status()
            raise AssertionError

        RegisterNode = StartRun = refuse

    control = object.__new__(superlink.Control)
    control._client = Client()  # type: ignore[assignment]
    with pytest.raises(raised):
        control.register(b"key")
    with pytest.raises(raised):
        control.submit()


@pytest.mark.parametrize("half", ["ca.key", "ca.pem", "server.key"])
def test_what_a_killed_server_has_half_made_is_made_again(tmp_path: Path, half: str) -> None:
    place = superlink.Place(tmp_path, 1)
    for folder in ("tls", "tls.part"):
        (place.home / folder).mkdir(parents=True)
        (place.home / folder / half).write_text("")
    (place.home / "secret").touch()
    (place.home / "secret.part").write_text("half")
    place.prepare()
    certificates.check(place.home / "tls")
    secret = place.home / "secret"
    assert len(secret.read_text()) == 64
    assert [path.stat().st_mode & 0o777 for path in (place.home, secret)] == [0o700, 0o600]
    kept = secret.read_bytes(), place.ca.read_bytes()
    place.prepare()
    assert (secret.read_bytes(), place.ca.read_bytes()) == kept


def test_rounds_are_told_once_each(tmp_path: Path) -> None:
    said: list[str] = []
    made = Supervisor(tmp_path, Settings(), said.append)
    made._tell_rounds()
    line = {"round": 1, "clients": 2, "dropped": 1, "seconds": 3.21, "eval_loss": 4.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    made._tell_rounds()
    made._tell_rounds()
    later = {**line, "round": 2, "eval_loss": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(later) + "\n")
    made._tell_rounds()
    assert said == [
        "round 1: 2 clients, 1 dropped, 3.2 s, held-out loss 4.0000",
        "round 2: 2 clients, 1 dropped, 3.2 s",
    ]


def test_a_run_that_fails_without_a_round_is_given_up(tmp_path: Path) -> None:
    said: list[str] = []
    made = Supervisor(tmp_path, Settings(), said.append)

    class Control:
        def submit(self) -> int:
            return 1

        def stop_others(self) -> None: ...

    control: Any = Control()
    tries = 0
    with pytest.raises(RoundError, match="failed 5 times without a round: boom"):
        while tries < 10:
            made._again(control, "boom")
            tries += 1
    assert tries == supervisor._TRIES - 1
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "round-000003.json").write_text("")
    made._again(control, "boom")  # it has brought a round: counted anew
    assert said[-1] == "the run goes on from round 3: boom"
