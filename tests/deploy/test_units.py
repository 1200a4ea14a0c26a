"""The systemd unit and the Dockerfile, as their own tools read them, where these are installed."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy" / "corolla-client.service"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    """The command is replaced by one that is there: `verify` looks for it."""
    text = UNIT.read_text()
    assert "/opt/corolla/bin/corolla" in text
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace("/opt/corolla/bin/corolla", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    own = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, own) == (0, []), done.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_says_that_it_can_do_little_harm(tmp_path: Path) -> None:
    """Of 10, for a service that may do anything, systemd calls 2 and less "OK"."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(UNIT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-200:]


def test_the_unit_never_gives_up_but_on_a_wrong_option() -> None:
    service = unit()["Service"]
    assert service["Restart"] == "always"
    assert service["RestartPreventExitStatus"] == "2"
    assert service["OOMPolicy"] == "continue"
    assert service["User"] == "corolla"


def test_the_units_command_is_one_that_there_is() -> None:
    words = unit()["Service"]["ExecStart"].split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "corolla", words[0], "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "COLUMNS": "200"},
    )
    assert words[0] == "client"
    assert all(word in done.stdout for word in words if word.startswith("--"))


@pytest.mark.skipif(not HADOLINT.exists(), reason="needs hadolint")
def test_hadolint_finds_nothing_wrong() -> None:
    done = subprocess.run(
        [str(HADOLINT), str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text()))
    return [(line.split()[0], line) for line in text.splitlines() if line.strip()]


def test_the_image_holds_what_the_wheel_needs_and_runs_as_nobody_special() -> None:
    found = instructions()
    copied = {word for kind, line in found if kind == "COPY" for word in line.split()[1:-1]}
    assert {"corolla", "server", "client", "strategies", "proto", "pyproject.toml"} <= copied
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    for name in copied - {"--from=build", "/opt/corolla"}:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
    assert [line for kind, line in found if kind == "USER"] == ["USER 10001"]
    pips = [line for kind, line in found if kind == "RUN" and "pip install" in line]
    assert len(pips) == 2
    assert all("--constraint constraints.txt" in line for line in pips)


def test_the_image_is_for_both_kinds_of_processor() -> None:
    """No base and no package of one platform alone; both stages have the same Python."""
    bases = [line.split()[1] for kind, line in instructions() if kind == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", bases[0])
    assert not re.search(r"amd64|x86_64|cu1\d\d", "\n".join(line for _, line in instructions()))
