"""Participation in rounds: which clients may take part, and what it has cost each of them.

For client-level privacy without amplification: who is asked is known, so a client has been through
one Gaussian mechanism, whose squared sensitivity is a sum over the rounds it was in.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

from corolla.privacy import banded


class Participation:
    """The rounds that clients were in, as far as they were noted, and what follows from them.

    A client may take part in at most `most` rounds (None: in all), and again only `separation`
    rounds later. Noise is correlated over `bands` <= `separation` rounds (1: it is not): a round
    shows a row of C x + z (see banded.py). A round that is done again shows the same row of C once
    more, and counts once more.
    """

    def __init__(self, bands: int, separation: int, most: int | None) -> None:
        self._c, self._separation, self._most = banded.coefficients(bands), separation, most
        self._squares: defaultdict[str, float] = defaultdict(float)
        """Client → μ² of the Gaussian mechanism it has been through."""
        self._rounds: defaultdict[str, list[int]] = defaultdict(list)
        """Client → its rounds, once for each time they were noted."""
        self._present: dict[int, frozenset[str]] = {}
        """Round → who was in it when it was last noted: later noise refers to that."""

    @property
    def times(self) -> int:
        """How often the client took part that did so most often."""
        return max(map(len, self._rounds.values()), default=0)

    @property
    def mu(self) -> float:
        """Of the client for whom it is largest, in standard deviations of the noise."""
        return math.sqrt(max(self._squares.values(), default=0.0))

    def next_mu(self, round: int, noise_multiplier: float) -> float:
        """Returns `mu` as it is after `round`, whichever of the clients that may take part do."""
        worst = 1 / noise_multiplier**2  # of a client that is new
        most = (sum(self._c) / noise_multiplier) ** 2
        for client, square in self._squares.items():
            if square + most <= worst:
                continue
            part = self._shown(client, round, not self.refusal(client, round))
            worst = max(worst, square + (part / noise_multiplier) ** 2)
        return math.sqrt(worst)

    def refusal(self, client: str, round: int) -> str:
        """Why a client may not take part, in one line; "" if it may."""
        before = self._rounds.get(client, [])
        if self._most is not None and len(before) >= self._most:
            return f"has trained in {len(before)} rounds, and participations={self._most}"
        near = [t for t in before if 0 < abs(round - t) < self._separation]
        if near:
            return f"has trained in round {near[-1]}, and separation={self._separation}"
        return ""

    def note(self, round: int, clients: Iterable[str], noise_multiplier: float) -> None:
        """A round with these clients."""
        present = frozenset(clients)
        lags = range(1, len(self._c))
        shown = present.union(*(self._present.get(round - lag, ()) for lag in lags))
        for client in shown:
            part = self._shown(client, round, client in present)
            self._squares[client] += (part / noise_multiplier) ** 2
        for client in present:
            self._rounds[client].append(round)
        self._present[round] = present

    def _shown(self, client: str, round: int, present: bool) -> float:
        """How much of a client this round shows: Σ of its entries in a row of C."""
        earlier = (
            c
            for lag, c in enumerate(self._c)
            if lag and client in self._present.get(round - lag, ())
        )
        return present * self._c[0] + sum(earlier)
