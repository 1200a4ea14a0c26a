"""What `corolla server` refuses before anything starts, in one line each, and what it tells."""

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
from corolla.server.deployment import superlink
from corolla.server.deployment.order import ServerSettings
from corolla.server.deployment.supervisor import Supervisor, begin


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    certificates.make(tmp_path / "certs", [])
    return tmp_path / "certs"


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield f"127.0.0.1:{held.getsockname()[1]}"


def refused(folder: Path, settings: ServerSettings, resume: bool = False, **options: Any) -> str:
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
    good = ServerSettings(address="127.0.0.1:0", certs=tls)
    assert "--certs DIR is missing" in refused(out, ServerSettings())
    assert "cannot read" in refused(out, ServerSettings(certs=tmp_path / "nowhere"))
    keys = good.model_copy(update={"clients_keys": tmp_path / "none"})
    assert "is no folder" in refused(out, keys)
    assert "use corolla simulate" in refused(out, good, step_seconds=1.0)
    assert "nothing to resume" in refused(out, good, resume=True)
    assert "Address already in use" in refused(out, ServerSettings(address=taken, certs=tls))
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
        said = refused(tmp_path / "out", ServerSettings(certs=tls))
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
    made = Supervisor(tmp_path, ServerSettings(), said.append)
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
