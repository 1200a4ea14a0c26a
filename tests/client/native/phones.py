"""Native phones as processes, with a trainer that a test scripts (stub_phone.cc)."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.phones import protocol
from corolla.wire import messages
from tests.client.native.fake_gateway import CONFIG, Fake, make_bundle, offering, public_half
from tests.server.gateway import gateways

FILES = {"fp32.pte": b"a program" * 999, "base.ptd": os.urandom(3 * protocol.CHUNK + 1234)}


class Running:
    """A process and the lines that it says."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.lines, self.errors = process, list[str](), ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def says(self, words: str, seconds: float = 60.0) -> None:
        gateways.until(lambda: any(words in line for line in self.lines), seconds)

    def finish(self, seconds: float = 60.0) -> int:
        """Its exit code."""
        code = self.process.wait(seconds)
        self._reader.join()
        assert self.process.stdout
        assert self.process.stderr
        with self.process.stdout, self.process.stderr as errors:
            self.errors = errors.read()
        return code

    def kill(self) -> None:
        """As the system kills: nothing can be tidied up."""
        self.process.kill()
        self.finish()


@dataclass
class World:
    """A fake gateway that serves at `address`, its bundle, and the key of its publisher."""

    folder: Path
    build: Path
    fake: Fake
    address: str
    key: Ed25519PrivateKey
    started: list[Running] = field(default_factory=list)

    @property
    def bundle(self) -> Path:
        return self.fake.bundle

    def state(self, device: str = "p1") -> Path:
        return self.folder / "phones" / device

    def script(self, name: str, content: object) -> Path:
        """A file for STUB or for --platform."""
        path, scratch = self.folder / name, self.folder / f"{name}.new"
        lines = content if isinstance(content, list) else [content]
        scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
        scratch.replace(path)
        return path

    def options(self, **changes: object) -> list[str]:
        """Of a phone p1 whose device is charging, idle and unmetered; None leaves one out."""
        if not (self.folder / "calm").exists():
            self.script("calm", [{"after": 0}])
        values: dict[str, object] = {
            "gateway": self.address,
            "token_file": self.folder / "token",
            "root_certificates": self.folder / "certs" / "ca.pem",
            "publisher": self.folder / "publisher.pub",
            "data": self.folder / "rows.jsonl",
            "state": self.state(str(changes.get("name", "p1"))),
            "name": "p1",
            "platform": f"script:{self.folder / 'calm'}",
            "retry_seconds": "0.05,0.3",
            **changes,
        }
        words: list[str] = []
        for name, value in values.items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                words.append(option)
            elif value is not None:
                words += [option, str(value)]
        return words

    def start(self, stub: Mapping[str, object] | None = None, /, **changes: object) -> Running:
        """A phone; `stub` is what its trainer does, if no `program` with another one is told."""
        program = str(changes.pop("program", "corolla-phone-stub"))
        script = self.script(f"stub-{len(self.started)}", dict(stub or {}))
        process = subprocess.Popen(
            [str(self.build / program), *self.options(**changes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "STUB": str(script)},
        )
        self.started.append(Running(process))
        return self.started[-1]

    def answers(self, device: str = "p1") -> list[dict[str, Any]]:
        """What the trainer of a phone was asked."""
        path = self.state(device) / "stub.log"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def history(self, device: str = "p1") -> list[dict[str, Any]]:
        path = self.state(device) / "history.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def installed(self, name: str) -> Path:
        """A file of the bundle, as a phone has it."""
        return self.state() / "bundles" / self.fake.model.sha256 / name


@contextmanager
def world(folder: Path, build: Path, files: Mapping[str, bytes] = FILES) -> Iterator[World]:
    """Ends what it started."""
    key = Ed25519PrivateKey.generate()
    public_half(key, folder / "publisher.pub")
    (folder / "token").write_text(f"{gateways.TOKEN}  # of a test\n")
    (folder / "rows.jsonl").write_text('{"input_ids": [1, 2, 3]}\n' * 9)
    fake = Fake(make_bundle(folder / "bundle", dict(files), key))
    with offering(folder, fake) as port:
        found = World(folder, build, fake, f"localhost:{port}", key)
        try:
            yield found
        finally:
            for phone in found.started:
                if not phone.process.stdout.closed:  # type: ignore[union-attr]
                    phone.kill()


def a_task(round: int = 1, **changes: object) -> messages.Task:
    """One that the stub answers, whatever it says."""
    return gateways.a_task(CONFIG, seats=1, round=round, **changes)


def settle(true: Callable[[], object], seconds: float = 60.0) -> None:
    gateways.until(true, seconds)
    time.sleep(0.05)
