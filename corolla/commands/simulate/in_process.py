"""A whole federation on one machine. A composition root: it brings server and client together."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from corolla.budgets import settle
from corolla.client.training.worker import Worker
from corolla.commands.simulate import secure
from corolla.config.rules import refuse_kept_updates
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, StoppedError, WireError
from corolla.host.files import scratch_folder
from corolla.host.processes import terminate_as_interrupt
from corolla.server.rounds.network import Network
from corolla.server.runs.attempts import how_to_go_on
from corolla.server.runs.folder import prepare_folder, stored_run
from corolla.server.runs.observer import Observer, Silent
from corolla.server.runs.run import Run
from corolla.server.runs.setup import set_up
from corolla.server.runs.summary import Summary
from corolla.starts import folder as starting_folder
from corolla.storage.memory import Memory
from corolla.wire.messages import Kind, Task, pack_task, unpack_reply
from corolla.wire.packet import Packet


@dataclass(frozen=True)
class InProcess(Network):
    """All clients in this process, one after another, on one resident base model."""

    worker: Worker

    def clients(self) -> Mapping[str, int]:
        hello = pack_task(Task("0" * 32, 0, "", Kind.HELLO, ""))
        answers = {c: unpack_reply(self.worker(c, hello), 0) for c in self.worker.data.clients}
        return {client: reply.num_examples for client, reply in answers.items()}

    def online(self) -> AbstractSet[str]:
        return self.worker.data.clients.keys()

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client, packet in packets.items():
            try:
                yield client, self.worker(client, packet)
            except WireError:
                yield client, None


def simulate(
    config: RunConfig,
    folder: Path,
    observer: Observer | None = None,
    *,
    keep_updates: bool = False,
    resume: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Summary:
    """Run a federation on this machine and leave its artefacts in `folder`.

    Raises CorollaError for anything a user can cause; an output folder that was new is removed
    again when nothing of the run was committed.
    """
    observer = observer or Silent()
    if keep_updates and config.kind.artefact == "model":
        raise ConfigError(f"--keep-updates keeps adapters: parameters={config.parameters} has none")
    if keep_updates and config.buffer:
        raise ConfigError("--keep-updates shows rounds of updates: with buffer there are none")
    if keep_updates:
        refuse_kept_updates(config)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    prepare_folder(folder, resume)
    existed = {path.name for path in folder.iterdir()}
    run_id = None
    if resume:
        begun, run_id, kept_updates = stored_run(folder)
        config = config.model_copy(update={"template_date": begun.template_date})
        config = settle.resumed(config, begun)
        keep_updates = keep_updates or kept_updates
    try:
        if config.engine == "flower":
            from corolla.commands.simulate.flower import simulate_on_flower

            return simulate_on_flower(config, folder, observer, keep_updates, resume, run_id)
        with terminate_as_interrupt():
            return _in_process(config, folder, observer, keep_updates, resume, run_id, on_step)
    except KeyboardInterrupt:  # before the run has begun, or in another thread than this one
        raise StoppedError(f"stopped{how_to_go_on(folder)}") from None
    finally:
        if not existed and not (folder / "checkpoint").exists():
            _undo(folder, made)


def _undo(folder: Path, made: Sequence[Path]) -> None:
    """Leave no trace of a run that committed nothing: empty its folder, remove what it made."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    for path in made:
        path.rmdir()


def _in_process(
    config: RunConfig,
    folder: Path,
    observer: Observer,
    keep_updates: bool,
    resume: bool,
    run_id: str | None,
    on_step: Callable[[int], None] | None,
) -> Summary:
    if not resume:
        starting_folder.check(config)
    loaded = set_up(config, run_id)
    config = loaded.config
    record = folder / "updates" if keep_updates else None
    with scratch_folder("memory") as scratch:
        memory = Memory(scratch, folder / "clients")
        given = (config, loaded.model, loaded.data, memory, record, on_step)
        worker = secure.worker(*given) if config.secure_sum else Worker(*given)
        run = Run(
            config,
            loaded.strategy,
            secure.joined(InProcess(worker), worker),
            loaded.evaluator,
            folder,
            settle.recalled(loaded.facts, folder, resume),
            observer,
            keep_updates,
            resume,
        )
        return run.execute()
