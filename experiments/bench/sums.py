"""Costs of secure sums: a member's processor and bytes, the server's, and masks against Flower's.

    python -m experiments.bench.sums --json FILE

A hundred members with updates of 4.6 million values; ten are lost in training. Everything runs in
this process, one thread, and is timed in seconds of the processor. The opened sum is held against
the integer sum. README.md says how to read the numbers.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.commands.plan.secure import exchanged
from corolla.errors import SecureSumError
from corolla.sums import keeper, ring, thresholds
from corolla.sums.device import Device, Owner
from corolla.sums.messages import Prepare
from corolla.sums.opening import Opening
from corolla.sums.quantise import Contribution, Quantiser, quantise, rounding
from corolla.sums.roster import Roster
from experiments.bench.zeroth_order import machine

RUN, TASK = bytes(16), bytes(32)
BARS = {"client_seconds": 0.6, "client_bytes_up": 15_000, "server_seconds": 6.0, "flower": 20.0}


def timed(times: dict[str, list[float]], name: str, deed: Callable[..., Any], *given: Any) -> Any:
    """The result of a deed, whose seconds of the processor are noted."""
    began = time.process_time()
    found = deed(*given)
    times.setdefault(name, []).append(time.process_time() - began)
    return found


def a_round(members: int, values: int, lost: int) -> dict[str, Any]:
    """One round of so many members, of which some are lost in training."""
    keys = [Ed25519PrivateKey.generate() for _ in range(members)]
    roster = Roster(
        tuple((f"{i:03}", key.public_key().public_bytes_raw()) for i, key in enumerate(keys))
    )
    devices = [Device(Owner(roster, i), key, set()) for i, key in enumerate(keys)]
    corrupt = thresholds.default_corrupt(members)
    missing = thresholds.most_missing(members, corrupt, 5)
    quantiser = Quantiser(1.0, 1, values)
    seats = tuple(roster.seat(RUN, i, own.session(RUN)) for i, own in enumerate(devices))
    call = Prepare(RUN, 1, 0, roster.sha256, missing, quantiser, seats)
    opening, times = Opening(call, roster, corrupt), dict[str, list[float]]()
    for number, own in enumerate(devices):
        deposit = timed(times, "prepare", own.prepare, call)
        opening.deposit(number, deposit)
    listing = opening.announce(TASK)
    update = np.random.default_rng(0).normal(size=values)
    update /= np.linalg.norm(update)
    began = time.process_time()
    words = rounding(0, 1, 0, quantiser.size)
    vector = quantise(quantiser, Contribution(update, 1), words)
    quantising = time.process_time() - began
    for number, own in enumerate(devices[lost:], lost):
        timed(times, "begin", own.begin, listing, TASK)
        masked = timed(times, "mask", own.mask, vector)
        timed(times, "add", opening.reply, number, masked)
    opening.close()
    for number, own in enumerate(devices):
        question = opening.question(number)
        answer = timed(times, "answer", keeper.answer, own, question)
        opening.answer(number, answer)
    opened = timed(times, "open", opening.open)
    assert np.array_equal(opened.total, vector * np.uint32(members - lost)), "the sum is not exact"
    median = {name: statistics.median(own) for name, own in times.items()}
    return {
        "members": members,
        "values": values,
        "lost": lost,
        "missing": missing,
        "floor": thresholds.floor(members, corrupt, missing),
        "seconds": {**median, "quantise": quantising},
        "client_seconds": quantising
        + sum(median[name] for name in ("prepare", "begin", "mask", "answer")),
        "server_seconds": sum(times["add"]) + times["open"][0],
        "client_bytes_up": exchanged(members)[0],
        "client_bytes_down": exchanged(members)[1],
    }


def masks(values: int, repetitions: int) -> dict[str, float]:
    """Values a second: masks that are added to a vector, here and by Flower's generator."""
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    vector = np.zeros(values, np.uint32)
    wide = np.zeros(values, np.int64)

    def ours() -> None:
        ring.add_masks(vector, [(os.urandom(32), 1) for _ in range(8)])

    def flowers() -> None:
        np.add(wide, pseudo_rand_gen(os.urandom(32), 1 << 32, [(values,)])[0], out=wide)

    times: dict[str, list[float]] = {}
    for _ in range(repetitions):  # in turn: what else the machine does slows both
        timed(times, "ours", ours)
        timed(times, "flower", flowers)
    rates = {
        "ours": 8 * values / statistics.median(times["ours"]),
        "flower": values / statistics.median(times["flower"]),
    }
    return {**rates, "ratio": rates["ours"] / rates["flower"]}


def main() -> None:
    """Measure, hold against the bars, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--values", type=int, default=4_600_000)
    parser.add_argument("--lost", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        found = a_round(options.members, options.values, options.lost)
    except SecureSumError as error:
        parser.error(str(error))
    rates = masks(options.values, 5)
    met = {
        "client_seconds": found["client_seconds"] <= BARS["client_seconds"],
        "client_bytes_up": found["client_bytes_up"] <= BARS["client_bytes_up"],
        "server_seconds": found["server_seconds"] <= BARS["server_seconds"],
        "flower": rates["ratio"] >= BARS["flower"],
    }
    result = {"machine": machine(), "round": found, "masks": rates, "bars": BARS, "met": met}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
