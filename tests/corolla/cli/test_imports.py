"""No command waits for a library that it does not use."""

import json
import subprocess
import sys

HEAVY = {
    *("torch", "transformers", "peft", "transformers.modeling_utils", "pydantic", "numpy", "scipy"),
    *("flwr", "grpc", "sqlalchemy", "datasets", "flwr_datasets", "pyarrow", "pandas"),
    *("matplotlib", "opacus", "dp_accounting", "cryptography", "starlette", "uvicorn", "httpx"),
}
"""Libraries, and the classes of models in transformers, that take a tenth of a second or more."""

STAGES: tuple[tuple[tuple[str, ...], set[str]], ...] = (
    (("cli.app",), set()),
    (("config.sections.settings",), {"pydantic"}),
    (
        ("config.load", "commands.keys", "commands.catalogue", "commands.compare.compare"),
        {"torch", "numpy"},
    ),
    (("server.runs.status",), set()),
    (
        (
            *("commands.data.screen", "commands.plan.screen", "phones.token_file"),
            "commands.export.order",
        ),
        {"transformers", "httpx", "cryptography"},
    ),
    (
        ("commands.simulate.in_process", "commands.check.proofs", "commands.artefacts"),
        {"peft", "transformers.modeling_utils", "scipy"},
    ),
    (("client.device.node",), {"grpc"}),
    (("commands.gateway", "client.phone.trainer", "client.device.daemon"), set()),
)
"""Modules that commands are made of → what of HEAVY they may bring beside that of lines above."""


def test_no_command_imports_what_it_does_not_use() -> None:
    """One process imports more and more, and says after each line what has come with it."""
    lines = [[f"corolla.{name}" for name in names] for names, _ in STAGES]
    code = (
        "import importlib, json, sys\n"
        f"for line in {lines!r}:\n"
        "    for name in line: importlib.import_module(name)\n"
        f"    print(json.dumps([name for name in {sorted(HEAVY)!r} if name in sys.modules]))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    may: set[str] = set()
    for line, (names, brought) in zip(done.stdout.splitlines(), STAGES, strict=True):
        may |= brought
        assert {*json.loads(line)} - may == set(), names
