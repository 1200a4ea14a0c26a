"""What is made of the checkout, each used once: wheel, sdist, app bundle, clone without links."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from corolla.client.device.settings import Own
from corolla.server.gateway.daemon import GatewayOrder
from corolla.server.gateway.settings import GatewaySettings
from corolla.version import __version__
from tests.e2e import checkout
from tests.e2e.checkout import ROOT, SIDES

BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
APPS = (
    "import corolla, corolla.server.app, corolla.client.app\n"
    "from flwr.clientapp import ClientApp\n"
    "from flwr.serverapp import ServerApp\n"
    "assert isinstance(corolla.server.app.app, ServerApp)\n"
    "assert isinstance(corolla.client.app.app, ClientApp)\n"
    "print(corolla.__file__, corolla.server.app.__file__, corolla.client.app.__file__)\n"
)
"""Loads the apps that Flower names, and prints whose they are."""


def run(command: list[str], folder: Path, path: Path | None = None, stdin: str = "") -> str:
    """What a command prints; `path` is where it finds corolla before anywhere else."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(path),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(path: Path | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | ({"PYTHONPATH": str(path)} if path else {})


def build_wheel(source: Path, folder: Path) -> Path:
    """The wheel of a checkout or of an sdist, in `folder`."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    pip = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder)]
    run([*pip, str(source)], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed_name(path: Path) -> str:
    """Where a source of the checkout, relative to it, lies in a wheel."""
    return path.as_posix() if path.parts[0] == "corolla" else f"corolla/{path.as_posix()}"


def modules(tree: Path) -> list[Path]:
    """Every Python file of the project once, relative to the checkout `tree`."""
    folders = [tree / name for name in ("corolla", *SIDES)]
    found = [file for folder in folders for file in folder.rglob("*.py")]
    beyond = [tree / "corolla" / side for side in SIDES]
    return sorted(file.relative_to(tree) for file in found if not set(beyond) & {*file.parents})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout.sources(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel is installed, and nothing else."""
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--target", str(target)]
    run([sys.executable, "-m", "pip", "install", *options, str(wheel)], target)
    return target


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    run([str(BIN / "flwr"), "build"], source)
    (built,) = source.glob("*.fab")
    return built


@pytest.fixture(scope="module")
def linkless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which each link is a small text file, as on Windows without the right to links."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a clone, or no git")
    folder = tmp_path_factory.mktemp("linkless")
    origin = checkout.repository(folder)
    clone = ["clone", "--quiet", "-c", "core.symlinks=false", str(origin), "clone"]
    checkout.git(folder, *clone)
    return folder / "clone"


def test_the_walk_finds_every_module_once() -> None:
    found = modules(ROOT)
    assert {Path("server/runs/run.py"), Path("corolla/cli/app.py")} <= {*found}
    assert [file for file, count in Counter(map(installed_name, found)).items() if count > 1] == []


def test_the_wheel_holds_every_module_and_nothing_twice(wheel: Path, source: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name, count in Counter(names).items() if count > 1] == []
    code = {name for name in names if name.endswith(".py")}
    assert code == {installed_name(file) for file in modules(source)}
    packages = {str(Path(name).parent).replace("/", ".") for name in code}
    assert {*PROJECT["tool"]["setuptools"]["packages"]} <= packages


def test_the_wheel_holds_what_the_modules_read_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"corolla/embedded/model/model.safetensors", "corolla/embedded/report.html.j2"}
    wanted |= {"corolla/py.typed", "corolla/embedded/data.jsonl", "corolla/proto/update.proto"}
    assert wanted | {"corolla/proto/device.proto", "corolla/proto/signs-v1.json"} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"corolla", f"corolla-{__version__}.dist-info"}
    assert [name for name in names if "/test" in name] == []


def test_an_installed_wheel_simulates(site: Path, tmp_path: Path) -> None:
    assert run([str(site / "bin" / "corolla"), "--version"], tmp_path, site).split()[-1] == (
        __version__
    )
    code = (
        f"{APPS}"
        "from corolla.embedded.assets import asset\n"
        "from corolla.cli.app import app\n"
        f"assert str(asset('model')).startswith({str(site)!r})\n"
        "app(['simulate', '--clients', '2', '--rounds', '1', '--local-steps', '1', '--out', 'o',"
        " '--set', 'eval-examples=4', '--set', 'eval-clients=0', '--set', 'threads=1'])"
    )
    whose = run([sys.executable, "-c", code], tmp_path, site).splitlines()[0]
    assert all(name.startswith(str(site / "corolla")) for name in whose.split())
    assert (tmp_path / "o" / "adapter").is_dir()


def test_the_sdist_makes_the_same_wheel(wheel: Path, source: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run([sys.executable, "-c", code], source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members), "no links: Windows"
    names = [member.name.partition("/")[2] for member in members if member.isfile()]
    assert {str(file) for file in modules(source)} | {"corolla/directions/signs.c"} <= {*names}
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert contents(build_wheel(sdist, tmp_path)) == contents(wheel)


def contents(wheel: Path) -> Mapping[str, int]:
    """Name → checksum, without the list of all checksums; of compiled code the name alone."""
    entries = zipfile.ZipFile(wheel).infolist()
    return {
        entry.filename: 0 if entry.filename.endswith((".so", ".pyd")) else entry.CRC
        for entry in entries
        if not entry.filename.endswith("/RECORD")
    }


def test_the_app_bundle_holds_the_code_and_only_code(bundle: Path, source: Path) -> None:
    assert bundle.stat().st_size < 10_000_000
    names = zipfile.ZipFile(bundle).namelist()
    wanted = {file.as_posix() for file in modules(source)}
    assert {"server/runs/run.py", "corolla/models/lora.py", "proto/update_pb2.py"} <= wanted
    assert {*names} == wanted | {"pyproject.toml", ".info/CONTENT"}
    assert len(names) == len(set(names))


def test_flower_loads_both_apps_from_the_bundle(bundle: Path, tmp_path: Path) -> None:
    components = PROJECT["tool"]["flwr"]["app"]["components"]
    assert components == {
        "serverapp": "corolla.server.app:app",
        "clientapp": "corolla.client.app:app",
    }
    zipfile.ZipFile(bundle).extractall(tmp_path / "app")
    (tmp_path / "empty").mkdir()
    whose = run([sys.executable, "-c", APPS], tmp_path / "empty", tmp_path / "app")
    assert all(name.startswith(str(tmp_path / "app")) for name in whose.split())


def test_a_clone_without_links_imports_the_same_names(linkless: Path, tmp_path: Path) -> None:
    assert all((linkless / "corolla" / side).is_file() for side in SIDES)
    version = run([sys.executable, "-m", "corolla", "--version"], tmp_path, linkless)
    assert version.split()[-1] == __version__
    names = [installed_name(file).removesuffix(".py").replace("/", ".") for file in modules(ROOT)]
    code = (
        "import importlib.util, json, sys\n"
        "names = json.load(sys.stdin)\n"
        "print(*(importlib.util.find_spec(name).origin for name in names), sep='\\n')\n"
    )
    whose = run([sys.executable, "-c", code], tmp_path, linkless, stdin=json.dumps(names))
    assert [Path(name).relative_to(linkless) for name in whose.splitlines()] == modules(ROOT)


def test_a_clone_without_links_passes_the_test_of_the_layers(linkless: Path) -> None:
    plain = ["--noconftest", "-p", "no:cacheprovider", "-q", "tests/test_architecture.py"]
    layout = ["-k", "walk or package or editor or source"]  # the rest only reads what these find
    told = run([sys.executable, "-B", "-m", "pytest", *plain, *layout], linkless, linkless)
    assert "1 skipped" in told  # the one that looks at the links


@pytest.mark.skipif(not (BIN / "ruff").exists(), reason="no ruff")
@pytest.mark.parametrize("command", ["check", "format --check"])
def test_lint_says_the_same_of_a_clone_without_links(command: str, linkless: Path) -> None:
    told = [
        subprocess.run(
            [str(BIN / "ruff"), *command.split(), "--no-cache", "."],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        for folder in (linkless, linkless.parent / "repository")
    ]
    assert told[0].returncode == told[1].returncode != 2, told[0].stderr
    assert told[0].stdout == told[1].stdout


def order_for_a_client(folder: Path) -> str:
    data = folder / "mine.jsonl"
    data.write_text("no JSON\n")
    own = Own(server="localhost:9092", data=str(data), state=folder)
    return json.dumps({"own": own.model_dump(mode="json"), "name": "ada"})


def order_for_a_gateway(folder: Path) -> str:
    files = [folder / name for name in ("gateway.pem", "gateway.key", "none")]
    order = GatewayOrder(GatewaySettings("north", folder), "127.0.0.1:0", *files)
    return json.dumps(order.to_json())


@pytest.mark.parametrize(
    ("module", "word", "order", "says"),
    [
        ("corolla", "nonsense", None, "No such command 'nonsense'"),
        ("corolla.client.device.relay", "--nonsense", None, "usage: relay.py"),
        ("corolla.client.device.supernode", "--nonsense", None, "usage: "),
        ("corolla.client.device.daemon", "socket", order_for_a_client, "mine.jsonl"),
        ("corolla.server.gateway.daemon", "socket", order_for_a_gateway, "none"),
    ],
)
def test_a_program_refuses_wrong_input_in_words(
    module: str, word: str, order: object, says: str, site: Path, tmp_path: Path
) -> None:
    """Those that others start by name: a module that has moved would be an ImportError."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, word],
        cwd=tmp_path,
        env=environment(site),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stderr
    if callable(order):
        process.stdin.write(f"{order(tmp_path)}\n")
        process.stdin.flush()
    told = process.stderr.read()  # its input stays open: a child whose parent has gone just ends
    assert process.wait() in (1, 2), told
    assert says in told
    assert "Traceback" not in told
    if callable(order):
        assert told.startswith("error: ")
        assert told.count("\n") == 1
    process.communicate()
