"""The Flower ServerApp: the same rounds as in process, over a Grid of nodes."""

import json
import shlex
import threading
import time
from collections.abc import Iterator, Mapping
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from corolla import models, wire
from corolla.config import RunConfig, load
from corolla.errors import ConfigError, RoundError, StoppedError, WireError
from corolla.server.run import Observer, Run, Summary, prepare_folder
from corolla.server.setup import set_up
from corolla.wire import Kind, Packet, Reply, Task, pack_reply, pack_task, unpack_task

_POLL = 0.05
_SETTLE = 2.0
"""Seconds without a new node after which those that are there are the federation."""
_LARGEST = 1 << 40

app = ServerApp()  # without annotation: `flwr build` looks for the bare assignment


class GridNetwork:
    """Nodes behind a Flower Grid, asked in our own loop: it has a deadline, no reply can end it."""

    def __init__(
        self, grid: Grid, run_id: str, config: RunConfig, nodes: int, stop: threading.Event
    ) -> None:
        """`nodes` is how many to wait for; 0: until none has joined for a while."""
        self.grid, self.run_id, self.config, self.stop = grid, run_id, config, stop
        self.node_ids = self._wait(nodes)
        if self.config.clients is None and not nodes:
            self.config = self.config.model_copy(update={"clients": len(self.node_ids)})
        self._nodes: dict[str, int] = {}

    def clients(self) -> Mapping[str, int]:
        """Ask every node who it is; nodes without data of their own are left out."""
        settings = json.dumps({"run": self.config.model_dump(mode="json")})
        hello = pack_task(Task(self.run_id, 0, "", Kind.HELLO, settings))
        found: dict[str, int] = {}
        reasons: list[str] = []
        for node, packet in self._exchange(dict.fromkeys(self.node_ids, hello)):
            try:
                reply = wire.unpack_reply(packet, 0)
            except WireError as error:
                reasons.append(str(error))
                continue
            if reply.error:
                reasons.append(reply.error)
            elif reply.client in found:
                reasons.append(f"two nodes say they are client {reply.client!r}")
            else:
                found[reply.client] = reply.num_examples
                self._nodes[reply.client] = node
        if not found:
            raise RoundError(f"none of {len(self.node_ids)} nodes is a client: {reasons[:1]}")
        return found

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        clients = {self._nodes[client]: client for client in packets}
        for node, packet in self._exchange({self._nodes[c]: p for c, p in packets.items()}):
            yield clients[node], packet

    def _exchange(self, packets: Mapping[int, Packet]) -> Iterator[tuple[int, Packet]]:
        """Send to nodes, yield (node, reply) as they come until all have or the deadline is over.

        Flower's own failures become error replies. A failure names the message it answers, not
        always the node that failed, hence the map of message ids.
        """
        deadline = time.monotonic() + self.config.deadline
        messages = [
            Message(wire.to_flower(packet), node, "train", ttl=self.config.deadline)
            for node, packet in packets.items()
        ]
        ids = list(self.grid.push_messages(messages))
        waiting = dict(zip(ids, packets, strict=True))
        while waiting and time.monotonic() < deadline:
            if self.stop.is_set():
                raise StoppedError("stopped")
            for message in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, _packet(message, packets[node])
            time.sleep(_POLL)

    def _wait(self, nodes: int) -> list[int]:
        found: list[int] = []
        since = time.monotonic()
        deadline = since + self.config.deadline
        while time.monotonic() < deadline:
            if self.stop.is_set():
                raise StoppedError("stopped")
            now = sorted(self.grid.get_node_ids())
            if now != found:
                found, since = now, time.monotonic()
            settled = time.monotonic() - since > _SETTLE
            if found and (len(found) >= nodes if nodes else settled):
                return found
            time.sleep(_POLL)
        raise RoundError(f"{len(found)} nodes are connected, {max(1, nodes)} are needed")


def serve(
    grid: Grid,
    config: RunConfig,
    folder: Path,
    observer: Observer,
    run_id: str,
    *,
    nodes: int = 0,
    keep_updates: bool = False,
    resume: bool = False,
    stop: threading.Event | None = None,
) -> Summary:
    """Run a federation over a Grid and leave its artefacts in `folder`."""
    network = GridNetwork(grid, run_id, config, nodes, stop or threading.Event())
    config = network.config
    loaded = set_up(config, run_id)
    return Run(
        config, network, loaded.evaluator, folder, loaded.facts, observer, keep_updates, resume
    ).execute()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Started by `flwr run`: settings come from the run config of the app."""
    settings = dict(context.run_config)
    folder = Path(str(settings.pop("out", "") or models.cache_dir() / "runs" / str(context.run_id)))
    more = shlex.split(str(settings.pop("set", "")))
    config = load(None, {key.replace("-", "_"): v for key, v in settings.items() if v != ""}, more)
    if config.simulates_time or any(own.drop for own in config.classes.values()):
        raise ConfigError(
            "buffer, deadline-simulated, step-seconds, and speed, upload, download and drop of "
            "classes simulate devices: use corolla simulate"
        )
    prepare_folder(folder, resume=False)
    summary = serve(grid, config, folder, _Log(), f"{context.run_id:032x}"[:32])
    log(
        INFO,
        "held-out loss %.4f -> %.4f; adapter %s (sha256 %s)",
        summary.base["loss"],
        summary.final["loss"],
        summary.artefact,
        summary.adapter_hash,
    )


class _Log:
    """Tells Flower's log what happens."""

    def started(self, facts: Mapping[str, Any], first_round: int) -> None:
        log(INFO, "%d clients, held-out loss %.4f", facts["num_clients"], facts["base"]["loss"])
        for warning in facts.get("warnings", ()):
            log(WARNING, "%s", warning)

    def round_started(self, round: int, cohort: int) -> None:
        log(INFO, "round %d: %d clients asked", round, cohort)

    def replied(self, client: str) -> None:
        """Not worth a line."""

    def round_ended(self, line: Mapping[str, Any]) -> None:
        shown = {k: line[k] for k in ("round", "train_loss", "eval_loss", "seconds", "dropped")}
        log(INFO, "%s", json.dumps(shown))


def _packet(message: Message, asked: Packet) -> Packet:
    """The packet of a reply; what is no packet becomes an error reply to the task it answers."""
    try:
        if not message.has_error():
            return wire.from_flower(message.content, _LARGEST)
        lines = (message.error.reason or "").strip().splitlines() or ["no reason given"]
        reason = f"Flower error {message.error.code}: {lines[-1]}"
    except WireError as error:
        reason = str(error)
    task = unpack_task(asked)
    return pack_reply(
        Reply(task.run_id, task.round, task.base_version, task.kind, "", error=reason)
    )
