"""The hash of a task, which each member of a secure sum computes from what it has received."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from corolla.sums import transcript
from corolla.tensors import tree
from corolla.types import LoraSpec, Payload


@dataclass(frozen=True)
class Common:
    """The settings of a task that are the same for all members of a sum.

    Who trains in another round or with another scaling may have an update of zeros, which leaves
    the sum to the others.
    """

    run: Mapping[str, Any]
    round: int
    lora: LoraSpec
    population: int


def digest(common: Common, model_sha256: str, version: str, groups: Payload) -> bytes:
    """The hash of a task: its settings, the model, a version, and every group in full.

    Of a strategy with a log `version` is that of its last row, which stands for all of them.
    """
    config = json.dumps(asdict(common), sort_keys=True).encode()
    contents = [(group, bytes.fromhex(tree.digest(own))) for group, own in groups.items()]
    return transcript.task(config, model_sha256.encode(), version.encode(), contents, b"")
