"""Native phones on the embedded task: forward passes over 4 bits, over fp32, and backpropagation.

    make phone
    python -m experiments.native_phones.run
    python -m experiments.native_phones.run --quick --out FOLDER

An arm is a federation of four `corolla-phone` processes on loopback, over TLS, with a gateway in
this process: `seed_pool` with a base of 4 bits, `seed_pool` with one of fp32, `fedavg` on LoRA with
backpropagation. Three seeds each. Bundles are exported once, into --out. Cells are written to
results.json as they end, and what is there is not run again. `--quick` shows in minutes that
everything works, and nothing else. README.md says how to read it.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from corolla.commands.compare.statistics import mean
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.encoding import Encoder
from corolla.host import certificates
from corolla.models import pretrained
from corolla.phones import protocol
from corolla.server.gateway.access import read_tokens
from corolla.server.gateway.gateway import Gateway
from corolla.server.gateway.service import serve_phones
from corolla.server.gateway.settings import GatewaySettings
from corolla.server.rounds.network import Network
from corolla.server.runs.observer import Silent
from corolla.server.runs.run import Run
from corolla.server.runs.setup import set_up
from corolla.server.runs.summary import Summary
from corolla.wire.messages import Kind, Task, pack_task, unpack_reply
from corolla.wire.packet import Packet
from experiments.bench.zeroth_order import machine

HERE = Path(__file__).parent
TOKEN = "a-token-of-the-experiment-01"
PHONES = ("p1", "p2", "p3", "p4")
SEEDS = (0, 1, 2)
RANK, LENGTH = 8, 128


@dataclass(frozen=True)
class Arm:
    """A way to train: which bases the bundle has, and settings of the run."""

    title: str
    bases: str
    settings: Mapping[str, Any]


FORWARD = {"strategy": "seed_pool", "local_steps": 40}
ARMS = {
    "q4": Arm("forward passes, 4 bits", "fp32,q4", FORWARD),
    "fp32": Arm("forward passes, fp32", "fp32", FORWARD),
    "grad": Arm("backpropagation, fp32", "fp32", {"strategy": "fedavg", "local_steps": 10}),
}
ALWAYS: Mapping[str, Any] = {
    "clients": 4,
    "cohort": 4,
    "rounds": 4,
    "batch_size": 4,
    "rank": RANK,
    "alpha": 2.0 * RANK,
    "max_length": 64,
    "eval_clients": 0,
    "eval_examples": 128,
    "partition": "iid",
    "threads": 1,
    "quorum": 1.0,
    "deadline": 900.0,
}
QUICK: Mapping[str, Any] = {"rounds": 1, "local_steps": 2, "eval_examples": 4}


@dataclass(frozen=True)
class Phones(Network):
    """One member, a gateway in this process."""

    gateway: Gateway

    def clients(self) -> Mapping[str, int]:
        return {"gate": self._hello().num_examples}

    def seats(self) -> Mapping[str, int]:
        return {"gate": self._hello().seats}

    def _hello(self) -> Any:
        packet = pack_task(Task("0" * 32, 0, "", Kind.HELLO, ""))
        return unpack_reply(self.gateway.answer(packet), 0)

    def ask(self, packets: Mapping[str, Packet]) -> Iterable[tuple[str, Packet | None]]:
        return [(member, self.gateway.answer(packet)) for member, packet in packets.items()]


def cell(name: str, seed: int, bundles: Path, client: Path, quick: bool) -> dict[str, Any]:
    """One run: held-out losses, bytes of a phone, seconds."""
    arm = ARMS[name]
    config = RunConfig(**{**ALWAYS, **arm.settings, **(QUICK if quick else {})}, seed=seed)
    bundle, method = bundles / arm.bases.replace(",", "-"), "grad" if name == "grad" else "loss"
    with tempfile.TemporaryDirectory(prefix="corolla-native-") as scratch:
        folder = Path(scratch)
        began = time.monotonic()
        summary = federate(config, folder, bundle, bundles / "publisher.pub", client, method)
        seconds = time.monotonic() - began
        headers = reported(folder)
        programs = {
            json.loads(line)["program"]
            for path in folder.glob("state-*/log.jsonl")
            for line in path.read_text().splitlines()
        }
        held = folder / "state-p1" / "bundles"
        return {
            "arm": name,
            "seed": seed,
            "programs": sorted(programs),
            "before": summary.base["loss"],
            "after": summary.final["loss"],
            "seconds": seconds,
            "updates": len(headers),
            "bytes_up": _mean(headers, "device_bytes_up"),
            "bytes_down": _mean(headers, "device_bytes_down"),
            "peak_rss": max(own["device_peak_rss_bytes"] for own in headers),
            "step_ms": _mean(headers, "device_step_ms_p50"),
            "base_bytes": sum(p.stat().st_size for p in held.rglob("*") if p.is_file()),
        }


def federate(
    config: RunConfig, folder: Path, bundle: Path, publisher: Path, client: Path, method: str
) -> Summary:
    """A run of four native phones, all in `folder`."""
    _write_tokens(config, folder)
    (folder / "run").mkdir()
    with (
        _gateway(folder, bundle) as (gateway, address),
        _phones(folder, address, publisher, client, method),
    ):
        loaded = set_up(config, None)
        run = Run(
            *(config, loaded.strategy, Phones(gateway), loaded.evaluator),
            *(folder / "run", loaded.facts, Silent()),
            own_devices=True,
        )
        return run.execute()


def reported(folder: Path) -> list[Mapping[str, float]]:
    """The metrics of every reply of a run."""
    paths = sorted(folder.glob("state-*/updates/round-*.header"))
    return [protocol.read_reply(Packet(path.read_bytes(), b"")).metrics for path in paths]


def _mean(headers: list[Mapping[str, float]], name: str) -> float:
    return statistics.fmean(own[name] for own in headers)


def _write_tokens(config: RunConfig, folder: Path) -> None:
    """Each client's training sequences, as its phone reads them."""
    federation = federated.load(config)
    encoder = Encoder(pretrained.load(config).tokenizer, federation.labels, config.max_length)
    for phone, split in zip(PHONES, federation.clients.values(), strict=True):
        with (folder / f"{phone}.jsonl").open("w") as file:
            for number, example in enumerate(split.train):
                for own in encoder(example):
                    line = {"input_ids": own.input_ids, "labels": own.labels, "example": number}
                    file.write(json.dumps(line) + "\n")


@contextmanager
def _gateway(folder: Path, bundle: Path) -> Iterator[tuple[Gateway, str]]:
    certificates.make(folder / "certs", ["localhost"], ["localhost"])
    (folder / "tokens").write_text(TOKEN + "\n")
    gateway = Gateway(
        GatewaySettings("gate", folder / "gate", seats=len(PHONES), retry=0.5, share_bundle=bundle)
    )
    server = serve_phones(
        gateway,
        read_tokens(folder / "tokens"),
        "localhost:0",
        folder / "certs" / "gateway.pem",
        folder / "certs" / "gateway.key",
    )
    try:
        yield gateway, f"localhost:{server.port}"
    finally:
        server.stop()


@contextmanager
def _phones(
    folder: Path, address: str, publisher: Path, client: Path, method: str
) -> Iterator[None]:
    (folder / "script").write_text('{"after": 0, "charging": true, "idle": true}\n')
    started = []
    try:
        for phone in PHONES:
            words = ["--gateway", address, "--name", phone, "--methods", method, "--keep-updates"]
            words += ["--token-file", str(folder / "tokens"), "--publisher", str(publisher)]
            words += ["--root-certificates", str(folder / "certs" / "ca.pem")]
            words += ["--data", str(folder / f"{phone}.jsonl"), "--state"]
            words += [str(folder / f"state-{phone}"), "--platform", f"script:{folder / 'script'}"]
            with (folder / f"{phone}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        [str(client), *words], stdout=log, stderr=subprocess.STDOUT, env=os.environ
                    )
                )
        yield
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            process.wait(60)


def export(bases: str, out: Path) -> None:
    """The bundle with these bases, unless it is there."""
    folder = out / bases.replace(",", "-")
    if folder.exists():
        return
    words = ["export", "embedded", "--to", "executorch", "--out", str(folder), "--base", bases]
    words += ["--key", str(out / "publisher.key"), "--rank", str(RANK), "--length", str(LENGTH)]
    subprocess.run([sys.executable, "-m", "corolla", *words], check=True)


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: a row for each arm, and paired differences to fp32 forward passes."""
    rows = [
        "| | held-out loss | to fp32 forward passes | up, bytes a round | down, bytes a round | "
        "base and program, MB | peak memory, MB | step, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    of = {(own["arm"], own["seed"]): own for own in cells}
    for name, arm in ARMS.items():
        own = [of[name, seed] for seed in SEEDS if (name, seed) in of]
        if not own:
            continue
        loss = _interval([one["after"] for one in own])
        pairs = [
            one["after"] - of["fp32", one["seed"]]["after"]
            for one in own
            if ("fp32", one["seed"]) in of
        ]
        apart = "" if name == "fp32" or not pairs else _interval(pairs, "+")
        rows.append(
            f"| {arm.title} | {loss} | {apart} "
            f"| {statistics.fmean(one['bytes_up'] for one in own):,.0f} "
            f"| {statistics.fmean(one['bytes_down'] for one in own):,.0f} "
            f"| {own[0]['base_bytes'] / 1e6:.1f} | {max(o['peak_rss'] for o in own) / 1e6:.0f} "
            f"| {statistics.fmean(one['step_ms'] for one in own):.1f} |"
        )
    return "\n".join(rows)


def _interval(values: list[float], sign: str = "") -> str:
    found = mean(values)
    half = "" if found.high is None else f" ± {found.high - found.mean:.3f}"
    return f"{found.mean:{sign}.3f}{half}"


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss against bytes that a phone sends in a round."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, arm), marker in zip(ARMS.items(), ("o", "x", "s"), strict=True):
        own = [one for one in cells if one["arm"] == name]
        places = [o["bytes_up"] for o in own], [o["after"] for o in own]
        axes.scatter(*places, label=arm.title, marker=marker)
    axes.set(
        xscale="log", xlabel="bytes a phone sends in a round", ylabel="held-out loss after the run"
    )
    axes.axhline(statistics.fmean(o["before"] for o in cells), color="grey", ls=":", lw=1)
    axes.annotate(
        "before",
        (0.99, cells[0]["before"]),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="top",
        color="grey",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run what is missing, print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE, help="of results and bundles")
    parser.add_argument("--client", type=Path, default=Path("build/native/corolla-phone"))
    parser.add_argument("--arms", nargs="*", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if not given.client.is_file():
        parser.error(f"{given.client} is not there: make phone")
    bundles = given.out / "bundles"
    bundles.mkdir(parents=True, exist_ok=True)
    for name in given.arms:
        export(ARMS[name].bases, bundles)
    results = given.out / "results.json"
    cells = json.loads(results.read_text())["cells"] if results.exists() else []
    known = {(own["arm"], own["seed"]) for own in cells}
    for seed in SEEDS[: 1 if given.quick else None]:
        for name in given.arms:
            if (name, seed) in known:
                continue
            cells.append(cell(name, seed, bundles, given.client.resolve(), given.quick))
            print(cells[-1], flush=True)
            results.write_text(json.dumps({"machine": machine(), "cells": cells}, indent=1) + "\n")
    print(table(cells))
    plot(cells, given.out / "losses.png")


if __name__ == "__main__":
    main()
