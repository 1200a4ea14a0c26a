"""The layers of the project, held against the syntax trees of all its files.

A package imports from packages on lines above its own. Nothing imports in a circle. Functions,
classes, modules and folders stay short enough to be read in a sitting.
"""

import ast
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from corolla.trackers import TRACKERS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("corolla", "server", "client", "strategies", "proto", "experiments")

# Lowest first. Names on one line never import each other.
LAYERS = (
    ("errors", "seeds", "types", "version"),
    ("interfaces",),
    ("host", "embedded", "tensors", "trackers", "proto"),
    ("wire", "directions"),
    ("aggregation", "storage", "sums"),
    ("strategies",),
    ("config",),
    ("privacy", "data", "models"),
    ("evaluation", "phones", "warnings", "estimates"),
    ("artefacts", "budgets", "drift", "starts"),
    ("selection", "edits"),
    ("client", "server"),
    ("commands",),
    ("api", "cli"),
    ("experiments", "__main__"),
)

# The same inside the two sides, for their rooms.
ROOMS = {
    "server": (("rounds",), ("runs", "sums"), ("gateway", "deployment"), ("app",)),
    "client": (("training",), ("device", "app"), ("phone",)),
}

# Library or package → the only places that may import it: modules, or packages with all in them.
PLACES = {
    "flwr": {
        "server.app",
        "server.deployment",
        "client.app",
        "client.device",
        "wire.packet",
        "commands.simulate.flower",
        "experiments.bench.sums",
    },
    "grpc": {"wire.rpc", "client.phone", "server.gateway.service", "proto"},
    "ray": set(),
    "peft": {
        "models",
        "evaluation.reader",
        "experiments.bench.llama_cpp",
        "experiments.bench.server_step",
    },
    "opacus": {"client.training.dpsgd", "privacy.accounting"},
    "dp_accounting": {"privacy.accounting"},
    "flwr_datasets": {"data"},
    "datasets": {"data"},
    "google": {
        "wire.parsing",
        "wire.rpc",
        "proto",
        "experiments.bench.mutations",
    },
    "prometheus_client": {"server.deployment.exporter"},
    "typer": {"cli"},
    "lm_eval": {"evaluation.harness"},
    "atheris": {"experiments.bench.fuzz_guided"},
    **{name: {f"trackers.{name}"} for name in TRACKERS},
    "huggingface_hub": {"models.files.folders", "commands.export.push"},
    "gguf": {"artefacts.gguf_architectures", "artefacts.gguf_vocabulary", "artefacts.gguf_files"},
    "executorch": {"phones.lowering"},
    "torchao": {"phones.lowering"},
    "pickle": set(),
    # The wire format is read and written in one place; the protocol of phones goes from hand to
    # hand as it is; the relay answers errors without torch, which the wire format imports.
    "corolla.proto.update_pb2": {
        "wire",
        "phones.protocol",
        "client.device.relay",
        "client.phone",
        "proto",
        "experiments.bench",
    },
    "corolla.proto.device_pb2": {
        "phones",
        "wire.rpc",
        "client.phone",
        "server.gateway",
        "proto",
        "experiments.bench",
    },
}

# Lines, or parameters without self.
LONGEST = {"function": 60, "parameters": 7, "class": 250, "module": 450, "folder": 2500}
MEDIAN_MODULE = 150
EXCEPTIONS = {
    "directions/signs.py": "one subject, a frozen specification: its parts are read together",
}
"""Module or module:name → why it may be longer. Ten at most."""


def name_of(path: Path) -> str:
    """A module's name without `corolla`: config.run, server.app, strategies.fedavg. corolla: ""."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "corolla" else parts
    return ".".join(part for part in parts if part != "__init__")


def _modules() -> dict[str, Path]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {name_of(path): path for path in paths}


MODULES = _modules()
OURS = {name: path for name, path in MODULES.items() if name.split(".")[0] != "experiments"}


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax of each module, read when the first test looks at it."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(tree: ast.Module) -> Iterator[str]:
    """Full dotted names of everything a module imports, at any depth of its code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def targets_of(name: str) -> set[str]:
    """Modules of the project that one of them imports. The face, `corolla`, is left out."""
    found = set()
    for target in imported(trees()[name]):
        own = target.removeprefix("corolla.") if target.startswith("corolla.") else ""
        while own and own not in MODULES:
            own = own.rpartition(".")[0]
        found.add(own)
    return found - {"", name}


@cache
def arrows() -> dict[str, set[str]]:
    """Module → the modules of the project that it imports."""
    return {name: targets_of(name) for name in MODULES if name}


def backwards(names: Mapping[str, str], layers: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports that do not point to a lower line; `names`: module → its name on a line."""
    rank = {name: number for number, line in enumerate(layers) for name in line}
    assert set(names.values()) <= rank.keys()
    return [
        f"{module} imports {target}"
        for module, name in names.items()
        for target in sorted(arrows()[module] & names.keys())
        if names[target] != name and rank[names[target]] >= rank[name]
    ]


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_the_walk_finds_the_project() -> None:
    assert {"server.rounds.round", "client.training.worker", "strategies.flora"} <= MODULES.keys()
    assert {"models.lora", "experiments.bench.memory", "cli.app", ""} <= MODULES.keys()
    assert len(arrows()["server.runs.run"]) > 10


def test_imports_point_to_lower_layers() -> None:
    assert backwards({name: name.split(".")[0] for name in arrows()}, LAYERS) == []


@pytest.mark.parametrize("side", ROOMS)
def test_imports_inside_a_side_point_to_lower_rooms(side: str) -> None:
    inside = {name: name.split(".")[1] for name in arrows() if name.startswith(f"{side}.")}
    assert backwards(inside, ROOMS[side]) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(arrows()) == []


def test_no_packages_import_each_other_in_a_circle() -> None:
    def package(name: str) -> str:
        return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0] or name

    graph: dict[str, set[str]] = defaultdict(set)
    for name, targets in arrows().items():
        graph[package(name)] |= {package(target) for target in targets} - {package(name)}
    assert circle(graph) == []


def test_a_circle_would_be_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_packages_say_what_they_are_and_import_nothing() -> None:
    """An import in a package's face would drag torch into the thin ClientApp."""
    faces = {n: trees()[n].body for n, p in OURS.items() if p.name == "__init__.py" and n}
    faces = {name: body for name, body in faces.items() if name != "trackers"}
    assert [name for name, body in faces.items() if len(body) != 1] == []
    assert all(ast.get_docstring(trees()[name]) for name in faces)


@pytest.mark.parametrize("library", PLACES)
def test_each_library_has_its_places(library: str) -> None:
    def here(name: str) -> bool:
        return any(name == place or name.startswith(f"{place}.") for place in PLACES[library])

    users = {
        name
        for name, tree in trees().items()
        for target in imported(tree)
        if target == library or target.startswith(f"{library}.")
    }
    assert [name for name in sorted(users) if not here(name)] == []


def at_once(name: str) -> set[str]:
    """What a module imports when it is imported itself, not in a function."""
    top = (node for node in trees()[name].body if isinstance(node, ast.Import | ast.ImportFrom))
    return {target for node in top for target in imported(ast.Module([node], []))}


def test_what_runs_on_one_machine_needs_no_module_of_unix() -> None:
    """Windows has neither: what simulates imports them where they are used, if they are there."""
    reached = set[str]()
    waiting = arrows()["cli.local"] | arrows()["cli.results"] | {"client.phone.session"}
    while waiting:
        reached |= waiting
        found = {target.removeprefix("corolla.") for name in waiting for target in at_once(name)}
        found |= {name.rpartition(".")[0] for name in found}
        waiting = (found & MODULES.keys()) - reached - {""}
    assert {"server.runs.checkpoint", "commands.compare.runner", "host.files"} <= reached
    assert [name for name in sorted(reached) if at_once(name) & {"fcntl", "resource"}] == []


def sizes() -> Iterator[tuple[str, str, int]]:
    """(kind, what, lines or parameters) of everything that has a bound."""
    folders: dict[str, int] = defaultdict(int)
    for name, path in OURS.items():
        if path.stem.endswith(("_pb2", "_pb2_grpc")):
            continue
        where = path.relative_to(ROOT).as_posix().removeprefix("corolla/")
        lines = path.read_text(encoding="utf-8").count("\n")
        folders[str(Path(where).parent)] += lines
        yield "module", where, lines
        for node in ast.walk(trees()[name]):
            if isinstance(node, ast.ClassDef):
                yield "class", f"{where}:{node.name}", node.end_lineno - node.lineno + 1  # type: ignore[operator]
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield "function", f"{where}:{node.name}", node.end_lineno - node.lineno + 1  # type: ignore[operator]
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                own = [argument for argument in every if argument.arg not in ("self", "cls")]
                yield "parameters", f"{where}:{node.name}", len(own)
    yield from (("folder", folder, lines) for folder, lines in folders.items())


def test_nothing_is_too_long_to_be_read_in_a_sitting() -> None:
    long = {
        what: f"{what}: {size} {'lines' if kind != 'parameters' else kind}"
        for kind, what, size in sizes()
        if size > LONGEST[kind]
    }
    assert [says for what, says in long.items() if what not in EXCEPTIONS] == []
    assert EXCEPTIONS.keys() <= long.keys(), "an exception is no longer needed"
    assert len(EXCEPTIONS) <= 10


def test_half_of_all_modules_are_short() -> None:
    lines = [size for kind, what, size in sizes() if kind == "module" and "__init__" not in what]
    assert statistics.median(lines) <= MEDIAN_MODULE


def test_the_top_level_packages_are_below_corolla_when_installed() -> None:
    """An installed top-level `proto` would overwrite proto-plus."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert all(package.split(".")[0] == "corolla" for package in table["packages"])
    assert not (ROOT / "proto" / "__init__.py").exists()


def test_every_package_is_in_the_wheel() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    faces = {f"corolla.{name}" for name, p in OURS.items() if p.name == "__init__.py" and name}
    assert {"corolla", "corolla.proto", *faces} == set(table["packages"])


def test_an_editor_can_follow_every_import() -> None:
    """`corolla.server` is a link to `server` in a checkout: static tools find what Python does."""
    for side in ("server", "client", "strategies", "proto"):
        link = ROOT / "corolla" / side
        if link.is_file():
            pytest.skip("a checkout without symbolic links")
        assert link.resolve() == ROOT / side


def test_git_ignores_no_source() -> None:
    """A pattern such as `runs/` would leave server/runs out of clones and app bundles."""
    lines = (ROOT / ".gitignore").read_text().splitlines()
    names = {part.name for path in MODULES.values() for part in path.relative_to(ROOT).parents}
    assert [line for line in lines if line.strip("/") in names and not line.startswith("/")] == []
