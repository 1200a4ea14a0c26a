"""Answers in order: what is folded in next does not depend on who was faster."""

from collections.abc import Iterable, Iterator, Sequence

from corolla.wire.packet import Packet


def in_order(
    answers: Iterable[tuple[str, Packet | None]], clients: Sequence[str]
) -> Iterator[tuple[str, Packet | None]]:
    """The answers in the order of `clients`, each as soon as all before it are known.

    None stands for no answer. Strangers and second answers are dropped: nobody counts twice.
    """
    waiting: dict[str, Packet | None] = {}
    left = list(clients)
    for client, packet in answers:
        if client in left and client not in waiting:
            waiting[client] = packet
        while left and left[0] in waiting:
            yield left[0], waiting.pop(left.pop(0))
    for client in left:
        yield client, waiting.get(client)
