"""Which sequences of a batch go through the model together: like ones, for little padding."""

from collections.abc import Sequence

import torch

_CALL = 64
"""Tokens whose computation is taken to cost as much as the calls of one more pass, on a CPU.

A choice between models, not a measurement of one: of large ones a pass costs less, of tiny ones
more than all the tokens of a batch, which so stays whole.
"""


def parts(lengths: Sequence[int], size: int | None, device: torch.device) -> list[list[int]]:
    """Places of sequences by their lengths in tokens, in parts that are computed one by one.

    With a `size` that many sequences at most are in a part. Without one, a CPU takes parts for
    which tokens, padding and passes together cost the least; elsewhere, where passes are dear and
    long, all are one part. What is chosen depends on lengths alone. Costs O(n²) for n sequences.
    """
    if size is None and device.type != "cpu":
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    most = size or len(order)
    cost, begin = [0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        ways = [
            (cost[start] + (end - start) * longest + _CALL, start)
            for start in range(max(0, end - most), end)
        ]
        best, start = min(ways)
        cost.append(best)
        begin.append(start)
    found: list[list[int]] = []
    end = len(order)
    while end:
        found.append(sorted(order[begin[end] : end]))
        end = begin[end]
    return found[::-1]
