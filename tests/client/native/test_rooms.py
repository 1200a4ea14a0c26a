"""The folders of the native client lie on top of each other, as its `#include` lines show."""

import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "client" / "native"
ROOMS = ("base", "training", "session", "tools")
"""A file includes files of its own folder and of those before it."""
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
MESSAGES = "corolla/proto/"
"""Headers that protoc makes; what lies in base needs a compiler alone."""


def includes(folder: Path) -> list[tuple[str, str]]:
    """Returns (file, what it includes between quotes) of all sources, by paths from `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in {".h", ".cc"})
    return [
        (path.relative_to(folder).as_posix(), included)
        for path in paths
        for included in INCLUDE.findall(path.read_text())
    ]


def wrong(folder: Path) -> list[str]:
    """Names each include that is not of the same folder, of one before it, or generated."""
    found = []
    for file, included in includes(folder):
        room, target = file.split("/")[0], included.split("/")[0]
        allowed = ROOMS[: ROOMS.index(room) + 1] if room in ROOMS else ()
        generated = included.startswith(MESSAGES) and room in ROOMS[1:]
        if not generated and not (target in allowed and (folder / included).is_file()):
            found.append(f"{file}: {included}")
    return found


def test_no_include_points_up() -> None:
    assert wrong(SOURCES) == []


def test_every_source_lies_in_a_folder_and_every_folder_has_sources() -> None:
    files = [path for path in SOURCES.rglob("*") if path.suffix in {".h", ".cc"}]
    assert {path.relative_to(SOURCES).parts[0] for path in files} == set(ROOMS)


def test_cmake_builds_every_source_once() -> None:
    lists = (SOURCES / "CMakeLists.txt").read_text()
    named = re.findall(rf"\b((?:{'|'.join(ROOMS)})/\w+\.cc)\b", lists)
    there = {path.relative_to(SOURCES).as_posix() for path in SOURCES.glob("*/*.cc")}
    assert set(named) == there
    repeated = {name for name in named if named.count(name) > 1}
    assert repeated <= {"tools/testbench.cc", "tools/check_vectors.cc"}  # a program of both builds


@pytest.mark.parametrize(
    ("file", "line", "points_up"),
    [
        ("base/a.h", '#include "base/b.h"', False),
        ("tools/a.cc", '#include "base/b.h"', False),
        ("base/a.h", '#include "training/b.h"', True),
        ("training/a.cc", '#include "session/b.h"', True),
        ("session/a.h", '  #  include "tools/b.h"', True),
        ("session/a.h", '#include "../base/b.h"', True),  # by another way than from the root
        ("session/a.h", '#include "b.h"', True),
        ("session/a.h", '#include "base/missing.h"', True),
        ("a.cc", '#include "base/b.h"', True),  # in no folder
        ("session/a.h", '#include "corolla/proto/device.pb.h"', False),
        ("base/a.h", '#include "corolla/proto/device.pb.h"', True),
        ("base/a.h", "#include <vector>", False),
    ],
)
def test_an_include_that_points_up_is_found(
    tmp_path: Path, file: str, line: str, points_up: bool
) -> None:
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "b.h").touch()
    (tmp_path / file).write_text(f"// A file.\n{line}\n")
    assert bool(wrong(tmp_path)) == points_up
