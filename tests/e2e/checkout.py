"""Copies of this checkout for tests that build: building leaves files behind."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("server", "client", "strategies", "proto")
"""Packages that lie beside `corolla` here and inside it in a wheel."""


def sources(folder: Path) -> Path:
    """All that is built, links as links, in `folder`/checkout: letters and digits for Flower."""
    target = folder / "checkout"
    for name in ("corolla", *SIDES):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def repository(folder: Path) -> Path:
    """A repository of git in `folder`/repository with what git does not ignore in this one."""
    target = folder / "repository"
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    git(target, "init", "--quiet")
    git(target, "add", "--all", "--force")
    someone = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    git(target, *someone, "commit", "--quiet", "--no-verify", "--message", "All")
    return target


def git(folder: Path, *words: str) -> str:
    """What git prints, run in `folder`."""
    return subprocess.run(
        ["git", "-c", "safe.directory=*", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
