"""Files and folders that are whole or absent, whatever happens while they are written."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from corolla.errors import ConfigError

_HELD = ".held"
"""The name of the file in a temporary folder whose lock says that a process uses the folder."""


def cache_dir() -> Path:
    """The folder for what can be made again: $COROLLA_CACHE, else the user's cache folder."""
    root = os.environ.get("COROLLA_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(root) if root else base / "corolla"


def write_atomic(path: Path, data: bytes, private: bool = False) -> None:
    """Write a file so that it is either the old one or the new one, whatever happens.

    A `private` file can be read by its owner alone, from its first byte on.
    """
    scratch = path.with_name(path.name + ".part")
    if private:
        scratch.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(scratch, flags, 0o600)
    else:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


@contextmanager
def making_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` once it is whole.

    What an earlier attempt left beside it is deleted first, and so is this one when filling fails.
    """
    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(scratch)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)


@contextmanager
def only_one(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock that ends with the process. Raises ConfigError(busy) where another has it."""
    import fcntl  # Windows, where runs can be simulated, has none

    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(busy) from None
        yield


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A temporary folder, deleted at the end; those that killed processes have left go first.

    A process holds a lock in its folder for as long as it lives: ids of processes would not tell,
    they are used again, and containers that share a folder for temporary files have their own.
    """
    if importlib.util.find_spec("fcntl"):
        for left in Path(tempfile.gettempdir()).glob(f"corolla-{purpose}-*/{_HELD}"):
            with suppress(ConfigError, OSError):
                if left.parent.lstat().st_uid == os.getuid():
                    with only_one(left, "in use"):
                        shutil.rmtree(left.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"corolla-{purpose}-") as made, ExitStack() as held:
        if importlib.util.find_spec("fcntl"):
            new = Path(made, f"{_HELD}.new")
            held.enter_context(only_one(new, "in use"))
            new.rename(Path(made, _HELD))  # it appears with its lock held
        yield Path(made)


@contextmanager
def private() -> Iterator[None]:
    """Lets the owner alone read what this process and its children create meanwhile."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def written(path: Path) -> tuple[int, int]:
    """The time in ns at which a file was written last, and its bytes; zeros where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def sync_folder(folder: Path) -> None:
    """Bring new names in a folder to disk; files themselves are synced by who writes them."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
