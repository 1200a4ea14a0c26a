"""A mapping that does not change: another with one more entry costs the same at any size."""

from collections.abc import Hashable, Iterator, Mapping
from itertools import chain
from typing import TypeVar

_PARTS = 256

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Shelf(Mapping[K, V]):
    """Entries in parts: `put` copies one of them and shares the others. In no order."""

    __slots__ = ("_parts",)

    def __init__(self, parts: tuple[Mapping[K, V], ...] = ({},) * _PARTS) -> None:
        self._parts = parts

    def put(self, key: K, value: V) -> "Shelf[K, V]":
        """The same entries but for that of `key`."""
        parts, place = list(self._parts), hash(key) % _PARTS
        parts[place] = {**parts[place], key: value}
        return Shelf(tuple(parts))

    def __getitem__(self, key: K) -> V:
        return self._parts[hash(key) % _PARTS][key]

    def __iter__(self) -> Iterator[K]:
        return chain.from_iterable(self._parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))
