"""mypy over the whole checkout, as one namespace: `python tests/typecheck.py`.

mypy does not follow the search path that `corolla/__init__.py` extends, so it gets a throw-away
tree in which the packages lie where a wheel puts them.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "client", "strategies", "proto")


def main() -> int:
    """Exit code of mypy."""
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch, "corolla")
        package.mkdir()
        for path in (ROOT / "corolla").iterdir():
            if path.name != "__pycache__":
                (package / path.name).symlink_to(path)
        for name in PACKAGES:
            (package / name).symlink_to(ROOT / name)
        for name in ("tests", "experiments"):
            Path(scratch, name).symlink_to(ROOT / name)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), "corolla", "tests", "experiments"]
        return subprocess.run(command, cwd=scratch, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
