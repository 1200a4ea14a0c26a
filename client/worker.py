"""The client side of a round: one resident model that serves one client, or many in simulation."""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from corolla import codec, seeds
from corolla.client.first_order import FirstOrder
from corolla.client.memory import Memory
from corolla.config import RunConfig
from corolla.data import Example, FederatedData
from corolla.encoding import Encoded, Encoder
from corolla.errors import CorollaError, WireError
from corolla.lora import LoraModel
from corolla.records import client_folder, round_folder, write_update
from corolla.scoring import score
from corolla.types import LoraSpec, Payload
from corolla.wire import Kind, Packet, Reply, Task, pack_reply, unpack_task

_RESIDENT_CLIENTS = 64
"""How many simulated clients keep their tokens in memory."""


@dataclass(frozen=True)
class LocalClient:
    """One client during one task: what a strategy sees of it."""

    seed: int
    lora: LoraSpec
    trainer: FirstOrder


class Worker:
    """Answers tasks for the clients whose data it holds.

    `record` (simulation only) is a folder for each client's adapter after local training.
    """

    def __init__(
        self,
        config: RunConfig,
        model: LoraModel,
        data: FederatedData,
        memory: Memory,
        record: Path | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.data = data
        self.memory = memory
        self.record = record
        self.on_step = on_step
        self.strategy = config.build_strategy()
        self._encoder = Encoder(model.base.tokenizer, data.labels, config.max_length)
        self._encoded: OrderedDict[str, tuple[list[Encoded], int]] = OrderedDict()

    def __call__(self, client: str, packet: Packet) -> Packet:
        """The reply of one client to one packet. What goes wrong becomes an error reply."""
        task = unpack_task(packet)
        blank = Reply(task.run_id, task.round, task.base_version, task.kind, client)
        try:
            reply = self._answer(client, task, blank)
        except CorollaError as error:
            reply = replace(blank, error=str(error))
        except torch.OutOfMemoryError:
            reply = replace(blank, error="out of memory: lower micro_batch_size or max_length")
        except (KeyError, ValueError, TypeError) as error:  # a task that does not fit this model
            reply = replace(
                blank, error=f"task cannot be done here: {type(error).__name__}: {error}"
            )
        return pack_reply(reply)

    def _answer(self, client: str, task: Task, blank: Reply) -> Reply:
        if client not in self.data.clients:
            raise WireError("this device has no such client")
        if task.kind == Kind.HELLO:
            return replace(blank, num_examples=len(self.data.clients[client].train))
        sent = codec.decode(task.payload)
        for group in task.cached.keys() & sent.keys():
            self.memory.keep(group, sent[group], task.cached[group])
        missing = self.memory.missing(task.cached)
        if missing:
            return replace(blank, missing=missing, error="cached groups are missing")
        self.memory.prune(task.cached)
        received = {**sent, **self.memory.recall(task.cached)}
        if task.kind == Kind.EVALUATE:
            return self._evaluate(client, received, blank)
        return self._train(client, task, received, blank)

    def _train(self, client: str, task: Task, received: Payload, blank: Reply) -> Reply:
        data, skipped = self._tokens(client)
        lora = LoraSpec(**json.loads(task.config)["lora"])
        self.model.check_rank(lora)
        seed = seeds.derive(self.config.seed, "client", client, task.round)
        trainer = FirstOrder(
            self.model, lora, data, self.config, seed, task.round, on_step=self.on_step
        )
        update = self.strategy.local(LocalClient(seed, lora, trainer), received)
        if self.record:
            folder = client_folder(round_folder(self.record, task.round), client)
            write_update(folder, self.model, lora, update, client)
        return replace(
            blank,
            num_examples=update.num_examples,
            metrics={**update.metrics, "skipped": float(skipped)},
            payload=codec.encode(update.payload),
        )

    def _evaluate(self, client: str, received: Payload, blank: Reply) -> Reply:
        examples = self.data.clients[client].eval[: self.config.eval_client_examples]
        data, _ = encode_all(self._encoder, examples)
        self.model.show(self.strategy.adapter(received), self.config.lora)
        metrics = score(self.model.model, data, self.model.base.pad_id, self.model.device)
        return replace(blank, num_examples=len(data), metrics=metrics)

    def _tokens(self, client: str) -> tuple[list[Encoded], int]:
        """A client's training sequences, and how many examples have no target left."""
        if client not in self._encoded:
            self._encoded[client] = encode_all(self._encoder, self.data.clients[client].train)
        self._encoded.move_to_end(client)
        while len(self._encoded) > _RESIDENT_CLIENTS:
            self._encoded.popitem(last=False)
        return self._encoded[client]


def encode_all(encoder: Encoder, examples: Sequence[Example]) -> tuple[list[Encoded], int]:
    """(sequences, number of examples without a target)."""
    encoded = [encoder(example) for example in examples]
    sequences = [replace(s, example=i) for i, own in enumerate(encoded) for s in own]
    return sequences, sum(not own for own in encoded)
