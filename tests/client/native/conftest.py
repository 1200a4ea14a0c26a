"""The native client is built once for all tests; without what it needs, they are skipped."""

import fcntl
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import bundles
from tests.bundles import Exported
from tests.client.native import phones
from tests.client.native.phones import World

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "client" / "native"


def lacking() -> str:
    """What of a compiler, its tools and libraries is not here; "" when all is."""
    tools = [
        name for name in ("cmake", "c++", "protoc", "grpc_cpp_plugin") if not shutil.which(name)
    ]
    if tools:
        return f"no {', '.join(tools)} here"
    if find_spec("executorch") is None:
        return "executorch is not installed"
    names = ("grpc++", "protobuf-lite", "libcrypto", "nlohmann_json", "zlib")
    libraries = ["pkg-config", "--exists", *names]
    if not shutil.which("pkg-config") or subprocess.run(libraries, check=False).returncode:
        return "no gRPC, protobuf, OpenSSL, JSON or zlib for C++ here"
    return ""


@pytest.fixture(scope="session")
def native_build() -> Path:
    """See `built`."""
    return built()


def built() -> Path:
    """A folder with corolla-phone, corolla-native-check and corolla-phone-stub.

    COROLLA_NATIVE_BUILD names one that is there already. Skips the test where it cannot be made.
    """
    if told := os.environ.get("COROLLA_NATIVE_BUILD"):
        return Path(told)
    if why := lacking():
        pytest.skip(f"the native client cannot be built: {why}")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()  # starts compilers without pauses
    folder = ROOT / ".venv" / ("native-ninja" if generator else "native-make")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker builds, the others wait
        packages = sysconfig.get_paths()["purelib"]
        quiet("cmake", *generator, "-S", SOURCES, "-B", folder, "-DCOROLLA_TESTS=ON",
              f"-DEXECUTORCH_DIR={packages}/executorch")  # fmt: skip
        quiet("cmake", "--build", folder, "-j", "2")
    return folder


@pytest.fixture(scope="session")
def small_bundle(native_build: Path) -> Exported:
    """Programs of the small model, where they can be run."""
    return bundles.small_bundle()


def quiet(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{command[:2]}: {(done.stdout + done.stderr)[-4000:]}", pytrace=False)


@pytest.fixture(autouse=True)
def quiet_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower sets this in the process that it is imported in: a phone would log what it tells."""
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)


@pytest.fixture
def offered(tmp_path: Path, native_build: Path) -> Iterator[World]:
    """A fake gateway with a bundle of a few chunks, and phones that can be started."""
    with phones.world(tmp_path, native_build) as found:
        yield found
