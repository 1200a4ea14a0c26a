"""The Flower ClientApp: unpacks a message, lets the resident worker answer it, packs the reply."""

import getpass
import json
import os
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from corolla.client.training.worker import Worker
from corolla.config.load import validate
from corolla.data import census, federated
from corolla.errors import CorollaError, WireError
from corolla.evaluation.labels import ordered
from corolla.models import devices, pretrained, trainable
from corolla.storage.memory import Memory
from corolla.wire.messages import Reply, pack_reply, unpack_task
from corolla.wire.packet import Packet, from_flower, to_flower
from corolla.wire.task_settings import RunSettings

_LARGEST = 1 << 40
MEMORY = "COROLLA_MEMORY"
KEPT = "COROLLA_KEPT"
RECORD = "COROLLA_KEEP_UPDATES"

app = ClientApp()  # without annotation: `flwr build` looks for the bare assignment


@app.train()
def answer(message: Message, context: Context) -> Message:
    """Every kind of task: what is asked stands in the packet's header."""
    packet = from_flower(message.content, _LARGEST)
    reply = _answer(packet, int(context.node_config.get("partition-id", 0)))
    return Message(to_flower(reply), reply_to=message)


def _answer(packet: Packet, partition: int) -> Packet:
    task = unpack_task(packet)
    try:
        settings = json.dumps(RunSettings.from_json(task.config).run, sort_keys=True)
        worker = _worker(settings, task.run_id)
        clients = sorted(worker.data.clients)
        if partition >= len(clients):
            raise WireError(f"node {partition} has no data: there are {len(clients)} clients")
        return worker(clients[partition], packet)
    except CorollaError as error:
        return pack_reply(
            Reply(task.run_id, task.round, task.base_version, task.kind, "", error=str(error))
        )


@lru_cache(maxsize=1)
def _worker(settings: str, run_id: str) -> Worker:
    """The resident model and data of one run: Flower's simulation keeps its processes."""
    config = validate(json.loads(settings))
    dataset = federated.load(config)
    dataset = replace(dataset, labels=ordered(config, dataset.labels))
    devices.set_threads(config)
    base = pretrained.load(config, dataset.labels)
    dataset = census.with_targets(config, dataset, base.tokenizer)
    model = trainable.build(config, base)
    # Local settings of this machine; a server cannot say where a device writes.
    record = os.environ.get(RECORD)
    memory = os.environ.get(MEMORY) or str(
        Path(tempfile.gettempdir(), f"corolla-memory-{getpass.getuser()}")  # checked by content
    )
    kept = os.environ.get(KEPT)
    return Worker(
        config,
        model,
        dataset,
        Memory(Path(memory) / run_id, Path(kept) if kept else None),
        Path(record) if record else None,
    )
