"""Replies made by libFuzzer: the child process of the section `guided` of fuzz.py.

An input is a byte that chooses the kind of reply, the length of a header (two bytes), the header,
and the payload. Checksums are made right: no search would ever find one.
"""

import sys

import atheris

with atheris.instrument_imports(
    include=[
        "corolla.wire.messages",
        "corolla.wire.codec",
        "corolla.wire.compression",
        "corolla.server.rounds.gate",
    ]
):
    from experiments.bench.fuzz_targets import targets

from corolla.wire.packet import Packet
from experiments.bench.mutations import REPLY, sealed

TARGETS = targets()


def one(data: bytes) -> None:
    """Examine one input; whatever it raises ends the search."""
    if len(data) < 3:
        return
    target = TARGETS[data[0] % len(TARGETS)]
    size = int.from_bytes(data[1:3], "little")
    header, body = data[3 : 3 + size], data[3 + size :]
    _, moved = target.examine(Packet(sealed(header, body, REPLY), body))
    assert moved <= 1 + 1e-5, f"{target.name} moves the model by {moved} bounds"


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
