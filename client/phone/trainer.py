"""`corolla phone`: the protocol of client/phone/session.py with the trainer of `corolla client`.

A native client has another trainer, of the same protocol (PhoneTrainer).
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from corolla.client.device.daemon import Trainer
from corolla.client.device.machine import probe
from corolla.client.device.node import only_one
from corolla.client.device.settings import Own
from corolla.client.phone.policies import NO_LIMITS, Limits
from corolla.client.phone.session import Phone, Settings
from corolla.data.files.sources import Source
from corolla.data.rows import check_clients, check_one_kind, counted, read
from corolla.errors import ConfigError, StoppedError, WireError
from corolla.host import logs
from corolla.host.processes import bypass_proxies, stoppable
from corolla.host.text import parse_bytes
from corolla.phones import protocol
from corolla.storage.memory import Memory
from corolla.wire import rpc
from corolla.wire.packet import Packet

_LONGEST_TOKEN = 256


class TorchTrainer:
    """Loads the model with the first task; keeps it for as long as name and model stay."""

    def __init__(self, own: Own, say: Callable[[str], None] = lambda line: None) -> None:
        """Reads the data, so that what is wrong with them is said at once. Raises DataError.

        `say` tells the owner why a task is not done.
        """
        self._own, self._say = own, say
        rows = read(Source(own.data, own.columns, own.splits, own.subset)).examples
        check_one_kind(rows, own.data)
        check_clients(rows, own.data)
        self._examples = counted("example" if own.epsilon else "none", rows)
        self._trainer: Trainer | None = None

    def examples(self) -> int:
        return self._examples

    def missing(self, run_id: str, groups: Mapping[str, str]) -> Sequence[str]:
        held = Memory(self._own.state / "runs" / run_id)
        held.prune(groups)  # before it is asked whether there is room for others
        return held.missing(groups)

    def answer(
        self, client: str, packet: Packet, model: Path | None, wanted: Callable[[], bool]
    ) -> Packet:
        own = self._own.model_copy(update={"model": str(model)}) if model else self._own
        if self._trainer is None or (self._trainer.name, self._trainer.own) != (client, own):
            self._trainer = None  # the old model goes before the new one comes
            self._trainer = Trainer(own, client, say=self._say)
        return self._trainer(packet, wanted)


def limits(daily_data: str | None, daily_seconds: float) -> Limits:
    """Returns the Limits of an owner on 24 hours. Raises ConfigError."""
    try:
        return Limits(parse_bytes(daily_data) if daily_data else 0, daily_seconds)
    except ValueError as error:
        raise ConfigError(f"--daily-data: {error}; found {daily_data!r}") from error


def settings(
    own: Own,
    name: str | None,
    token_file: Path,
    has_model: bool,
    told: Mapping[str, bool | None],
    limits: Limits = NO_LIMITS,
) -> Settings:
    """Returns the Settings that the options of `corolla phone` give.

    `told` overrides what the device finds out itself. Raises ConfigError.
    """
    try:
        token = token_file.read_text(encoding="utf-8").split("#")[0].strip()
        own.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        device = protocol.check_device(name or _name(own.state))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"cannot use {token_file} or {own.state}: {reason}") from error
    except WireError as error:
        raise ConfigError(f"--name: {error}") from error
    if not 0 < len(token) <= _LONGEST_TOKEN or not token.isascii() or len(token.split()) != 1:
        raise ConfigError(f"{token_file} holds no token: one line, as in the gateway's own file")
    given = {condition: value for condition, value in told.items() if value is not None}
    return Settings(
        device,
        token,
        own.state,
        own_model=has_model,
        conditions=lambda: {**vars(probe(own.state)), **given},
        limits=limits,
        disk=own.disk_limits,
    )


def begin(
    own: Own, chosen: Settings, say: Callable[[str], None], rounds: int = 0, once: bool = False
) -> None:
    """Be a phone until a signal, or for so many rounds. Raises CorollaError."""
    bypass_proxies()
    with stoppable() as stop, only_one(own.state):
        logs.configure(own.state / "log.jsonl")
        trainer = TorchTrainer(own, say)
        channel = rpc.tls_channel(
            own.server, own.root_certificates, most_bytes=protocol.MAX_MESSAGE
        )
        try:
            phone = Phone(chosen, channel, trainer, stop, say)
            say(f"{chosen.device} has {trainer.examples()} examples, asks {own.server}")
            phone.run(rounds, once)
        except StoppedError:
            say("stopped")
        finally:
            channel.close()
            logs.unconfigure()


def _name(state: Path) -> str:
    """A name that is made once."""
    path = state / "name"
    if not path.exists():
        path.write_text(f"phone-{secrets.token_hex(8)}")
    return path.read_text().strip()
