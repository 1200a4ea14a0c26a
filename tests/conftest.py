"""What all tests share: no network, one thread, a tiny random model and a tiny federation."""

import gc
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # also for commands: two workers times two threads would spin

import pytest
from hypothesis import settings as hypothesis_settings

from tests import scheduling
from tests.e2e import forked
from tests.e2e.fork_server import ANSWER_TOKENS
from tests.e2e.forked import Commands

# What takes seconds to import is imported where it is used: the process that only hands out tests
# would make its workers wait for it.
if TYPE_CHECKING:
    import transformers

    from corolla.config.run import RunConfig

if threading.current_thread() is threading.main_thread():
    # A background job of a shell, as CI may be, starts with SIGINT ignored, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every machine; a fixture is built once for all examples of a test.
hypothesis_settings.register_profile(
    "corolla", derandomize=True, deadline=None, database=None, max_examples=100
)
hypothesis_settings.load_profile("corolla")

Settings = Callable[..., "RunConfig"]

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "tests/client/native/",
    "tests/corolla/phones/test_lowering",
    "tests/e2e/",
    "tests/experiments/",
)
"""Where the tests start processes, compile or train for a while."""
DEPLOYMENTS = "tests/e2e/"
"""Where the tests of deployments are, and no others are collected for them."""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Every second worker reads each folder from its end.

    Compiling the tests takes as long as importing what they need, and each worker finds what
    another has compiled.
    """
    report = yield
    worker = getattr(collector.config, "workerinput", {"workerid": "gw0"})["workerid"]
    if isinstance(collector, pytest.Dir) and int(worker.removeprefix("gw")) % 2:
        report.result.reverse()
    return report


def pytest_collection() -> None:
    """Nothing of what is collected is garbage: nobody looks for any among it, then or later."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that is marked as nothing else is a `unit`; what takes longest is begun first.

    The order is the same in all workers, whatever they have collected first. Raises UsageError for
    a deployment in a folder that `make e2e` does not collect.
    """
    for item in items:
        path = item.path.relative_to(ROOT).as_posix()
        if item.get_closest_marker("deployment"):
            if not path.startswith(DEPLOYMENTS):
                raise pytest.UsageError(f"{item.nodeid} is a deployment: move it to {DEPLOYMENTS}")
        elif not item.get_closest_marker("command"):
            item.add_marker("command" if path.startswith(COMMANDS) else "unit")
    items.sort(key=lambda item: (scheduling.place(item.nodeid), item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Of `pytest -n 2`: see tests/scheduling.py."""
    return scheduling.Groups(config, log)


@pytest.fixture(scope="session", autouse=True)
def _forks() -> Iterator[Callable[[], Commands]]:
    """Starts, when it is first needed, the one process that this worker's commands are forks of.

    The process in which a run reads what it has saved is one of them: importing what it needs takes
    seconds. It is started cold by the commands that are, see tests/e2e/test_readme.py.
    """
    import torch

    from corolla.evaluation import other_process
    from corolla.server.runs import evaluate

    torch.set_num_threads(1)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        @cache
        def start() -> Commands:
            folder = Path(tempfile.mkdtemp(prefix="corolla-"))  # a socket's path has 107 characters
            stack.callback(shutil.rmtree, folder)
            return stack.enter_context(forked.serving(folder))

        def command() -> list[str]:
            return [str(start().bin / "python"), "-m", "corolla.evaluation.reader"]

        patch.setattr(other_process, "command", command)
        patch.setattr(evaluate, "_ANSWER_TOKENS", ANSWER_TOKENS)
        yield start


@pytest.fixture(scope="session")
def commands(_forks: Callable[[], Commands]) -> Commands:
    """Commands of Corolla as forks of one process that has imported everything."""
    return _forks()


def byte_tokenizer(pad: str = "<pad>") -> "transformers.PreTrainedTokenizerBase":
    """One token a byte: <eos> is 0, <pad> is 1, the bytes follow. Any text is encoded exactly."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    made: transformers.PreTrainedTokenizerBase = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token=pad
    )
    return made


@pytest.fixture
def tokenizer() -> "transformers.PreTrainedTokenizerBase":
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer: grouped-query attention, tied embeddings."""
    import torch

    from corolla.commands.check import tiny_models
    from corolla.commands.check.tiny_models import Size

    folder: Path = tmp_path_factory.mktemp("models") / "llama"
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        size = Size(vocabulary=258, hidden=16, intermediate=24, layers=1, positions=128)
        model = tiny_models.llama(size, initializer_range=0.2, pad_token_id=1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def federation_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clients of unequal size; prompts and responses, no two rows alike."""
    path: Path = tmp_path_factory.mktemp("data") / "federation.jsonl"
    rows = [
        {"client_id": name, "prompt": f"{name} {i}?", "response": f"{name[::-1]} {'ab' * (i % 5)}"}
        for name, number in (("ada", 6), ("ben", 9), ("cyd", 12), ("dot", 7))
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(tiny_model: Path, federation_file: Path) -> Settings:
    """A config of a run that takes a second, with the changes given."""

    from corolla.config.run import RunConfig

    def make(**changes: Any) -> RunConfig:
        values: dict[str, Any] = {
            "model": str(tiny_model),
            "data": str(federation_file),
            "rounds": 3,
            "cohort": 4,
            "rank": 2,
            "alpha": 4.0,
            "local_steps": 2,
            "batch_size": 3,
            "lr": 0.01,
            "schedule": "constant",
            "max_length": 48,
            "eval_examples": 8,
            "threads": 1,
            "device": "cpu",
        }
        return RunConfig(**{**values, **changes})

    return make
