"""The hash of a task, which each member of a secure sum computes from what it has received."""

import json
from collections.abc import Mapping

from corolla.sums import transcript
from corolla.tensors import tree
from corolla.types import Payload


def digest(
    run: Mapping[str, object], model_sha256: str, base_version: str, groups: Payload
) -> bytes:
    """The hash of a task: settings of the run, model, version, and every group in full.

    Of a strategy with a log there are no groups: its rows are in `base_version`.
    """
    config = json.dumps(run, sort_keys=True).encode()
    contents = [(group, bytes.fromhex(tree.digest(own))) for group, own in groups.items()]
    return transcript.task(config, model_sha256.encode(), base_version.encode(), contents, b"")
