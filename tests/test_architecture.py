"""Who may import whom: one table, held against the syntax trees of all files."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("corolla", "server", "client", "strategies", "proto", "experiments")

# Composition roots bring server and client together; nothing else may.
ROOTS = {
    "corolla.__init__",
    "corolla.__main__",
    "corolla.commands.audit.run",
    "corolla.auditing",
    "corolla.cli.app",
    "corolla.cli.deployment",
    "corolla.cli.local",
    "corolla.commands.simulate.in_process",
    "corolla.commands.compare.compare",
    "corolla.commands.compare.results",
    "corolla.commands.compare.report",
    "corolla.commands.simulate.flower",
    "corolla.commands.check.proofs",
    "corolla.commands.catalogue",
    "corolla.commands.gateway",
    "corolla.commands.plan.plan",
    "corolla.commands.simulate.progress",
}

# Layer → what of Corolla it may import. Imports point one way.
ALLOWED = {
    "proto": {"proto"},  # one generated file imports the other
    "core": {"core"},
    "strategies": {"core"},
    "server": {"server", "strategies", "core"},
    "client": {"client", "strategies", "core"},
    "root": {"root", "server", "client", "strategies", "core"},
    "experiments": {"experiments", "root", "server", "client", "strategies", "core"},
}
EXCEPTIONS = {
    ("corolla.wire.messages", "proto"): "the wire format is read and written in one place",
    ("strategies.registry", "strategies"): "the registry; one algorithm never imports another",
    ("corolla.config.run", "strategies"): "a config names a strategy and refuses unknown options",
    ("corolla.config.rules", "strategies"): "what a strategy goes with follows from its traits",
    ("corolla.wire.rpc", "proto"): "the services that trainers and phones speak",
    ("client.relay", "proto"): "an error reply without torch, which the wire format imports",
    ("experiments.bench.mutations", "proto"): "it writes what no sender writes",
    ("experiments.bench.fuzz_targets", "proto"): "valid messages, to be mutated",
}

# Both ends of proto/device.proto, whose messages go from hand to hand as they are.
SPEAK_PHONES = (
    *(
        "corolla.phones.protocol",
        "client.phone",
        "client.downloads",
        "server.phones",
        "server.gateway",
    ),
    *("server.blobs", "server.outbound", "server.uploads", "experiments.bench.phones"),
    *("server.job", "server.natives", "server.offer", "client.policies"),
)
EXCEPTIONS |= {(module, "proto"): "it speaks the protocol of phones" for module in SPEAK_PHONES}

# Library → the only modules that may import it.
LIBRARIES = {
    "flwr": {
        "server.app",
        "server.grid",
        "server.superlink",
        "client.app",
        "client.relay",
        "client.supernode",
        "corolla.wire.packet",
        "corolla.commands.simulate.flower",
    },
    "grpc": {"corolla.wire.rpc", "client.phone", "server.phones", "proto.device_pb2_grpc"},
    "ray": set(),
    # adapters of factors, and of anything else; a contender
    "peft": {"corolla.models.lora", "corolla.models.dense", "experiments.bench.server_step"},
    "opacus": {"client.dpsgd", "corolla.privacy.accounting"},
    "dp_accounting": {"corolla.privacy.accounting"},
    "flwr_datasets": {"corolla.data.federated"},
    "datasets": {"corolla.data.federated"},
    "google": {
        "client.relay",
        "corolla.phones.protocol",
        "corolla.wire.messages",
        "proto.update_pb2",
        "proto.device_pb2",
        "experiments.bench.mutations",
    },
    "prometheus_client": {"server.metrics"},
    "typer": {
        "corolla.cli.app",
        "corolla.cli.deployment",
        "corolla.cli.local",
        "corolla.cli.options",
    },
    "lm_eval": {"corolla.evaluation.harness"},
    "atheris": {"experiments.bench.fuzz_guided"},
    "tensorboard": {"corolla.trackers.tensorboard"},
    "wandb": {"corolla.trackers.wandb"},
    "mlflow": {"corolla.trackers.mlflow"},
    "trackio": {"corolla.trackers.trackio"},
    "huggingface_hub": {"corolla.models.full"},
    "executorch": {"corolla.phones.lowering"},
    "torchao": {"corolla.phones.lowering"},
    "pickle": set(),
}


def modules() -> dict[str, ast.Module]:
    """Every Python file of the project except tests, by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module) -> set[str]:
    """Full dotted names of everything a module imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(module: str) -> str:
    """The layer of a module, named by its place in the checkout or as it is imported."""
    parts = module.removeprefix("corolla.").split(".")
    if parts[0] in ALLOWED and parts[0] not in {"core", "root"}:
        return parts[0]
    home = f"corolla.{parts[0]}"
    return "root" if home in ROOTS or module in ROOTS else "core"


def test_the_walk_finds_the_project() -> None:
    names = modules().keys()
    assert {"server.rounds", "client.worker", "strategies.flora", "corolla.models.lora"} <= names
    assert len(names) > 30


def test_imports_point_one_way() -> None:
    wrong = []
    for name, tree in modules().items():
        own = layer(name)
        for target in imports(tree):
            if not target.startswith("corolla"):
                continue
            wanted = layer(target)
            if wanted not in ALLOWED[own] and (name, wanted) not in EXCEPTIONS:
                wrong.append(f"{name} ({own}) imports {target} ({wanted})")
    assert wrong == []


def test_each_library_has_its_one_place() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules().items()
        for target in imports(tree)
        for library, places in LIBRARIES.items()
        if target.partition(".")[0] == library and name not in places
    ]
    assert wrong == []


def test_the_namespace_packages_are_not_top_level_when_installed() -> None:
    """An installed top-level `proto` would overwrite proto-plus."""
    import tomllib

    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert all(package.split(".")[0] == "corolla" for package in table["packages"])
    assert not (ROOT / "proto" / "__init__.py").exists()


def test_every_package_is_in_the_wheel() -> None:
    import tomllib

    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inner = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "corolla").rglob("__init__.py")
        if not any(part.is_symlink() for part in path.parents)
    }
    assert {"corolla", "corolla.trackers"} <= inner <= set(table["packages"])


def test_exceptions_are_still_needed() -> None:
    used = {(name, layer(t)) for name, tree in modules().items() for t in imports(tree)}
    assert used >= EXCEPTIONS.keys()
