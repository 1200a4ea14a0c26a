"""What documents, docstrings and comments name is there: files, modules, commands, targets.

Looked at are all Markdown files, the docstrings and comments of Python, the comments of C++, C,
protobuf, TOML, make and CMake, and the files of deploy/.
"""

import ast
import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import click
import pytest
import typer

from corolla.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("corolla", "server", "client", "strategies", "proto", "tests", "experiments", "deploy")
LINKS = {ROOT / "corolla" / side for side in ("server", "client", "strategies", "proto")}

EXAMPLES = {
    "part_way.py",
    "clipped.py",
    "median_of_means.py",
    "mine.py",
    "x.py",
    "devices.toml",
    "client.toml",
    "topics.py",
    "b.h",
}
"""Files that a text has its reader write, or that Python brings."""
PEERS = ("corolla.v1", "corolla.proto", "corolla/proto/update.pb", "corolla/proto/device.")
"""How names begin that are no modules and no files: packages and headers of protobuf."""

FILE = re.compile(
    r"(?<![\w./<*-])((?:[\w-]+/)*[a-z][\w-]*\.(?:py|cc|h|c|md|toml|proto|cmake|conf|service|j2))"
    r"(?![\w/*-]|\.\w)"
)
FOLDER = re.compile(rf"(?<![\w./-])((?:{'|'.join(TOPS)})/(?:[\w-]+/)*[\w-]*)(?![\w*.-])")
MODULE = re.compile(r"(?<![\w./-])((?:corolla|experiments|tests)(?:\.[A-Za-z_]\w*)+)")
COMMAND = re.compile(r"(?:(?<=`)|^ *(?:python -m )?)corolla ([a-z]+)\b([^`|&;>#\n]*)", re.MULTILINE)
OPTION = re.compile(r"(?<!\S)(--[a-z][a-z-]*)")
TARGET = re.compile(
    r"(?:(?<=`)|^ *)(?:sudo )?make ([a-z][a-z0-9-]*)(?=`| *(?:#.*)?$)", re.MULTILINE
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")

Text = tuple[str, str]
"""(file, text): a whole document, a docstring or a line of comment."""


def files(*endings: str) -> Iterator[Path]:
    yield from (path for path in sorted(ROOT.iterdir()) if path.name.endswith(endings))
    for folder in (*(ROOT / top for top in TOPS), ROOT / "docs"):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name.endswith(endings) and not LINKS & {*path.parents}:
                yield path


def prose(path: Path) -> Iterator[str]:
    """What a file says to people."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from (line.group(1) for line in re.finditer(r"(?:^|\s)# (.*)", text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                yield str(node.value.value)
    elif path.suffix in {".cc", ".h", ".c", ".proto"}:
        yield from (line.group(1) for line in re.finditer(r"// (.*)", text))
    elif path.suffix in {".toml", ".cmake"} or path.name in {"Makefile", "CMakeLists.txt"}:
        yield from (line.group(1) for line in re.finditer(r"(?:^|\s)# (.*)", text))
    else:
        yield re.sub(r"\\\n\s*", " ", text)  # a command goes on in the next line


@cache
def texts() -> list[Text]:
    code = (".py", ".cc", ".h", ".c", ".proto", ".toml", ".cmake", "Makefile", "CMakeLists.txt")
    kinds = (*code, ".md", ".conf", ".service", "Dockerfile")
    found = [path for path in files(*kinds) if "_pb2" not in path.name and path != Path(__file__)]
    return [(path.relative_to(ROOT).as_posix(), text) for path in found for text in prose(path)]


@cache
def names() -> set[str]:
    """The names, without folders, of all files that a text may mean."""
    return {path.name for path in files("")}


def is_file(name: str, said_in: str) -> bool:
    """Whether a path leads somewhere, from the checkout, corolla/, or the text's own folder."""
    if Path(name).name in EXAMPLES or "NAME" in name or name == "FILE.py":
        return True
    if "/" not in name:
        return name in names()
    bases = (ROOT, ROOT / "corolla", ROOT / "client" / "native", (ROOT / said_in).parent)
    return any((base / name).exists() for base in bases)


def is_folder(name: str, said_in: str) -> bool:
    return (ROOT / name).exists() or (ROOT / f"{name}.py").exists()


def is_module(name: str, said_in: str) -> bool:
    """Whether a dotted name is a package, a module, or something in one."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        with suppress(ModuleNotFoundError):
            if spec := importlib.util.find_spec(".".join(parts[:size])):
                return size == len(parts) or parts[size] in defined(spec.origin)
    return False


@cache
def defined(origin: str | None) -> set[str]:
    """Names that a module defines or assigns at its top, and those that it offers lazily."""
    found = set()
    for node in ast.parse(Path(origin).read_text(encoding="utf-8")).body if origin else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
            offered = node.value if names == ["__all__"] else None
            found |= {*(ast.literal_eval(offered) if offered else names)}
    return found


PATTERNS: dict[str, tuple[re.Pattern[str], Callable[[str, str], bool]]] = {
    "file": (FILE, is_file),
    "folder": (FOLDER, is_folder),
    "module": (MODULE, is_module),
}


def missing(kind: str, said: list[Text]) -> list[str]:
    pattern, there = PATTERNS[kind]
    return sorted(
        {
            f"{file}: {name}"
            for file, text in said
            for name in pattern.findall(text)
            if not name.startswith(PEERS) and not there(name, file)
        }
    )


@pytest.mark.parametrize("kind", PATTERNS)
def test_what_a_text_names_is_there(kind: str) -> None:
    assert missing(kind, texts()) == []


@pytest.mark.parametrize(
    ("kind", "text", "wrong"),
    [
        ("file", "see wire.py", "wire.py"),
        ("file", "(`corolla/wire/gone.py`)", "corolla/wire/gone.py"),
        ("file", "`server/test_gate.py`", "server/test_gate.py"),
        ("folder", "beside corolla/none/ and", "corolla/none/"),
        ("module", "python -m corolla.client.daemon", "corolla.client.daemon"),
        ("module", "corolla.wire.messages.gone", "corolla.wire.messages.gone"),
    ],
)
def test_a_name_of_nothing_would_be_found(kind: str, text: str, wrong: str) -> None:
    assert missing(kind, [("docs/deploy.md", text)]) == [f"docs/deploy.md: {wrong}"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("file", "gate.py, server/rounds/gate.py, wire/messages.py, base/hash.h and FILE.py"),
        ("folder", "corolla/embedded/model/, server/runs, client/native/"),
        (
            "module",
            "corolla.wire.messages.pack_reply in corolla.wire, corolla.v1.Phones, tests.e2e",
        ),
        ("module", "corolla.simulate, corolla.trackers.TRACKERS and corolla.errors.CorollaError"),
    ],
)
def test_a_name_of_something_is_found(kind: str, text: str) -> None:
    assert PATTERNS[kind][0].findall(text)
    assert missing(kind, [("README.md", text)]) == []


def test_links_between_documents_lead_somewhere() -> None:
    documents = list(files(".md"))
    assert len(documents) > 10
    broken = [
        f"{path.relative_to(ROOT)}: {link}"
        for path in documents
        for link in LINK.findall(path.read_text(encoding="utf-8"))
        if not (path.parent / link).exists()
    ]
    assert broken == []


def test_commands_and_their_options_are_there() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    options = {
        name: {"--help"}.union(*(each.opts + each.secondary_opts for each in command.params))
        for name, command in group.commands.items()
    }
    said = [(file, *found) for file, text in texts() for found in COMMAND.findall(text)]
    assert len(said) > 50
    assert [f"{file}: corolla {verb}" for file, verb, _ in said if verb not in options] == []
    unknown = [
        f"{file}: corolla {verb} {option}"
        for file, verb, words in said
        for option in OPTION.findall(words)
        if option not in options[verb]
    ]
    assert unknown == []


def test_targets_of_make_are_there() -> None:
    made = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = {
        (str(path.relative_to(ROOT)), target)
        for path in files(".md")
        for target in TARGET.findall(path.read_text(encoding="utf-8"))
    }
    assert {"test", "phone", "check"} <= {target for _, target in said}
    assert [pair for pair in sorted(said) if pair[1] not in made] == []


def test_every_room_is_on_the_map() -> None:
    """CONTRIBUTING.md says of each package what is in it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    where = text[text.index("## Where things are") : text.index("## Tests")]
    said = set(re.findall(r"^ {4,6}(\w+)", where, re.MULTILINE))
    sides = [ROOT / side for side in ("corolla", "server", "client")]
    rooms = {path.parent.name for side in sides for path in side.glob("*/__init__.py")}
    assert {"rounds", "training", "wire"} <= rooms
    assert rooms <= said


def test_what_epsilon_means_is_arithmetic() -> None:
    """Odds e^ε; from even odds e^ε / (1 + e^ε); true positives where 1 % are false."""
    page = (ROOT / "docs" / "privacy.md").read_text()
    for epsilon in (1, 3, 8):
        odds = math.exp(epsilon)
        found = min(odds * 0.01, 1 - 0.99 / odds)
        row = f"| {epsilon} | {odds:.4g} times | {100 * odds / (1 + odds):.4g} % | "
        assert row + f"{100 * found:.4g} % |" in page
