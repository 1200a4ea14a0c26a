"""Programs of a bundle that a gateway offers to native phones, and demands of rounds on phones."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from corolla import seeds
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.directions import seedlog
from corolla.errors import ArtefactError, ConfigError, WireError
from corolla.host.text import one_line
from corolla.phones import budget, bundle, protocol
from corolla.phones.budget import TRAINERS, Able, Assignment, Demand, Timing
from corolla.phones.bundle import Manifest
from corolla.proto import device_pb2 as pb
from corolla.server.gateway.blobs import Blobs, manifest_of
from corolla.server.gateway.merging import Merging
from corolla.server.rounds.federation import classes_behind
from corolla.strategies import offset
from corolla.tensors import factors
from corolla.types import Params
from corolla.wire.messages import Log

_MOST_METHODS, _MOST_STRATEGIES, _MOST_TIMINGS, _LONGEST_NAME = 8, 64, 64, 64
_MOST_TOKENS = 1 << 20
_MANIFEST = "manifest-"


class Programs:
    """A bundle, each of its programs with its files as native phones download them."""

    def __init__(self, folder: Path, publisher: Path | None, blobs: Blobs, state: Path) -> None:
        """Reads all files once. Raises ConfigError for a bundle that is none, or is damaged."""
        for left in state.glob(f"{_MANIFEST}*"):  # of a bundle of an earlier process
            left.unlink()
        try:
            self.manifest: Manifest = bundle.read(folder, publisher, state / bundle.SERIALS)
            bundle.verify(folder, self.manifest)
            self._files = {
                program.name: _shared(
                    [bundle.MANIFEST, bundle.SIGNATURE, *program.files], folder, blobs, state
                )
                for program in self.manifest.programs
            }
        except (ArtefactError, WireError, OSError) as error:
            raise ConfigError(f"--share-bundle: {error}") from error

    def files(self, assigned: Assignment) -> pb.Blob:
        """The Manifest of the files that an assignment needs."""
        return self._files[assigned.program]

    def assign(self, request: pb.CheckInRequest, demand: Demand) -> Assignment | str:
        """Returns a phone's Assignment, or why it has none, in one line (see budget.assign)."""
        try:
            return budget.assign(self.manifest, self._able(request), demand)
        except WireError as error:
            return str(error)

    def _able(self, request: pb.CheckInRequest) -> Able:
        held = [name for name, own in self._files.items() if own.sha256 == request.manifest]
        return replace(_able(request), held=next(iter(held), ""))

    def demand(self, merging: Merging) -> Demand | str:
        """Returns the Demand of a task on native phones, or why none can meet it, in one line."""
        config, sha256 = merging.config, merging.task.model_sha256
        if sha256 not in ("", self.manifest.model_sha256):
            return (
                f"the run is of base model {sha256[:12]}, this gateway's programs are of "
                f"{self.manifest.model_sha256[:12]} ({self.manifest.model})"
            )
        if why := _refuses(config):
            return f"native devices have no {why}"
        if offset.GROUP in merging.task.cached:
            return "native devices have no constant block beside the base, as the run's start makes"
        found = {name: tuple(tensor.shape) for name, tensor in merging.fresh.items()}
        wanted = {tensor.name: tensor.shape for tensor in self.manifest.adapter}
        if found != wanted:
            odd = min(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))
            return (
                f"the run trains another adapter than this gateway's programs, of rank "
                f"{self.manifest.rank} on {', '.join(self.manifest.targets)}: first {odd}"
            )
        behind = classes_behind(config, merging.kind)
        kinds = {own: behind[trainer] for own, trainer in TRAINERS.items() if trainer in behind}
        if config.dropout:
            kinds.pop("grad", None)
        if not kinds:
            return f"native devices have no dropout={config.dropout:g} for backpropagation"
        settings = {method: config.of_class(kind) for method, kind in kinds.items()}
        return Demand(
            kinds,
            Path(config.strategy).name,
            config.max_length,
            {method: partial(_passes, method, own) for method, own in settings.items()},
            {method: own.batch_size for method, own in settings.items()},
        )

    def first(self, merging: Merging, log: Log) -> Params:
        """The adapter that a run with a log began from, made of its seed.

        Raises WireError where that does not lead to the log's origin.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in merging.fresh.items()}
        modules = {
            name: (shapes[name + factors.B][0], shapes[name + factors.A][1])
            for name in factors.modules(merging.fresh)
        }
        config = merging.config
        start = factors.fresh(modules, self.manifest.rank, seeds.derive(config.seed, "init"))
        base = merging.task.model_sha256 or self.manifest.model_sha256
        origin = seedlog.origin(base, merging.strategy.init(start, config.seed))
        if origin != log.origin:
            raise WireError(
                f"this gateway's programs start from version {origin[:8]}, the run from "
                f"{log.origin[:8]}: another base model, or another adapter on it"
            )
        return start


def to_message(assigned: Assignment | None) -> pb.Assignment | None:
    """As a phone is told; its letter is for logs alone."""
    if assigned is None:
        return None
    return pb.Assignment(**{k: v for k, v in vars(assigned).items() if k != "budget"})


def run_as(assigned: Assignment | None) -> Mapping[str, object]:
    """For a line of the log."""
    names = ("program", "method", "kind", "length", "budget")
    return {name: getattr(assigned, name) for name in names} if assigned else {}


def _passes(method: str, config: RunConfig, examples: int) -> int:
    steps = schedule.steps_per_round(config, examples)
    return steps * (2 * config.queries if method == "loss" else 1)


def _refuses(config: RunConfig) -> str:
    """Names the setting of a run that native clients have no half of; "" when there is none."""
    wrong = {
        f"parameters={config.parameters}": not config.kind.native,
        "classes.NAME.layers": config.partial,
        "target-parameters, new-tokens or dora": not config.plain_lora,
        "strategy.train=A": config.options.get("train") == "A",
        "dp=example": config.dp == "example",
        "keep-hardest or rank- or alpha-pattern": bool(config.keep_hardest or config.patterned),
        f"codec {', '.join(config.codec)}": bool(config.codec),
        f"codec-down {', '.join(config.codec_down)}": bool(config.codec_down),
    }
    return next((name for name, is_wrong in wrong.items() if is_wrong), "")


def _shared(names: list[str], folder: Path, blobs: Blobs, state: Path) -> pb.Blob:
    """Offer files of a folder, and the Manifest of them."""
    data, files = manifest_of(folder, names, protocol.PROGRAM_FILES)
    path = state / f"{_MANIFEST}{protocol.sha256(data)[:16]}"
    return blobs.share_all(data, files, path)


def _able(request: pb.CheckInRequest) -> Able:
    """Reads the abilities that a phone reports. Raises WireError for what breaks a limit."""
    native = request.native
    for what, names, most in (
        ("methods", native.methods, _MOST_METHODS),
        ("strategies", native.strategies, _MOST_STRATEGIES),
        ("timings", [max(t.program, t.method, key=len) for t in native.timings], _MOST_TIMINGS),
    ):
        if len(names) > most or any(len(name) > _LONGEST_NAME for name in names):
            raise WireError(f"it reports more {what}, or longer ones, than are taken in")
    return Able(
        methods=tuple(one_line(name, protocol.MAX_TEXT) for name in native.methods),
        strategies=tuple(one_line(name, protocol.MAX_TEXT) for name in native.strategies),
        signs=native.signs,
        runtime=one_line(native.runtime, protocol.MAX_TEXT)[:_LONGEST_NAME],
        memory=request.capabilities.memory_bytes,
        length=min(native.length, _MOST_TOKENS),
        timings=tuple(_timings(native)),
        examples=request.num_examples,
    )


def _timings(native: pb.Native) -> Iterator[Timing]:
    for own in native.timings:
        yield Timing(own.program, own.method, own.length, own.seconds)
