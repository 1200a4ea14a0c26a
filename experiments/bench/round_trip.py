"""What a round over real processes costs beyond its training: TLS, keys, SuperLink, SuperNodes.

    python -m experiments.bench.round_trip --rounds 8

A `corolla server` and two `corolla client` on loopback, all three as users start them, with the
embedded model and data. The overhead of a round is its time on the server less the longest training
that a client's log tells of: what is left is messages, Flower's processes and the aggregation. Also
how often a trainer's process began: a model that is loaded once began once. README.md has a table.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from corolla.host import certificates

CLIENTS = ("asyncio", "calendar")
RUN = (
    "--strategy fedavg --local-steps 10 --batch-size 8 --min-clients 2 --set threads=1 "
    "--set eval-examples=8 --set eval-clients=0 --set deadline=300"
)


@contextmanager
def started(command: Sequence[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A command of corolla, ended by its id."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "corolla", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(120)


def run(folder: Path, rounds: int) -> None:
    """A federation in `folder` until it is done."""
    keys, out = folder / "keys", folder / "out"
    keys.mkdir()
    certificates.make(folder / "certs", [])
    server = f"server {RUN} --rounds {rounds} --address 127.0.0.1:0 --certs {folder / 'certs'} "
    server += f"--clients-keys {keys} --out {out}"
    with ExitStack() as stack:
        at_work = stack.enter_context(started(server.split(), folder / "server.log"))
        place = out / "flower" / "place.json"
        while not place.exists():
            if at_work.poll() is not None:
                raise SystemExit((folder / "server.log").read_text())
            time.sleep(0.2)
        address = json.loads(place.read_text())["address"]
        for name in CLIENTS:
            made = f"client --make-key --state {folder / name}".split()
            subprocess.run(
                [sys.executable, "-m", "corolla", *made], check=True, capture_output=True
            )
            (keys / f"{name}.pub").write_bytes((folder / name / "client.pub").read_bytes())
            client = f"client --server {address} --root-certificates {folder / 'certs' / 'ca.pem'} "
            client += f"--data embedded --name {name} --threads 1 --state {folder / name}"
            stack.enter_context(started(client.split(), folder / f"{name}.log"))
        if at_work.wait(3600):
            raise SystemExit((folder / "server.log").read_text())


def lines(path: Path) -> list[dict[str, object]]:
    """Of JSON, one each."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def overheads(folder: Path) -> list[tuple[int, float, float]]:
    """(round, its seconds, the longest training in it)."""
    trained: dict[int, float] = {}
    for name in CLIENTS:
        for line in lines(folder / name / "log.jsonl"):
            if line.get("event") == "answered" and line.get("kind") == "TRAIN":
                round, seconds = int(str(line["round"])), float(str(line["seconds"]))
                trained[round] = max(trained.get(round, 0.0), seconds)
    found = lines(folder / "out" / "metrics.jsonl")
    return [
        (int(str(line["round"])), float(str(line["seconds"])), trained[int(str(line["round"]))])
        for line in found
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="corolla-round-trip-") as scratch:
        folder = Path(scratch)
        run(folder, rounds)
        found = overheads(folder)
        loaded = [
            sum(line.get("event") == "model ready" for line in lines(folder / name / "log.jsonl"))
            for name in CLIENTS
        ]
    print("| round | seconds | training | beyond it |\n|---|---|---|---|")
    for number, seconds, training in found:
        print(f"| {number} | {seconds:.1f} | {training:.1f} | {seconds - training:.1f} |")
    beyond = [seconds - training for _, seconds, training in found]
    print(f"\nbeyond training: median {statistics.median(beyond):.1f} s, most {max(beyond):.1f} s")
    print(f"times a model was loaded by each trainer: {loaded}")


if __name__ == "__main__":
    main()
