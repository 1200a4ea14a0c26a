from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from corolla.server.rounds.ordering import in_order
from corolla.wire.packet import Packet

P = {name: Packet(name.encode(), b"") for name in "abcdef"}


@given(st.permutations("abcde"))
def test_answers_come_in_the_order_of_clients(arrival: Sequence[str]) -> None:
    found = list(in_order([(c, P[c]) for c in arrival], "abcde"))
    assert found == [(c, P[c]) for c in "abcde"]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef?"), st.sampled_from([*P.values(), None])), max_size=12
    )
)
def test_everybody_is_answered_for_exactly_once(
    answers: list[tuple[str, Packet | None]],
) -> None:
    """Duplicates, strangers and silence: the first answer of each counts."""
    members = "bcde"
    found = list(in_order(answers, members))
    first: dict[str, Packet | None] = {}
    for client, packet in answers:
        first.setdefault(client, packet)
    assert found == [(c, first.get(c)) for c in members]


def test_answers_are_passed_on_as_soon_as_they_can_be() -> None:
    """So that an aggregate is summed in the memory of few updates, not of all."""
    asked: list[str] = []

    def arriving() -> Iterator[tuple[str, Packet | None]]:
        for client in "abdc":
            asked.append(client)
            yield client, P[client]

    answers = in_order(arriving(), "abcd")
    assert (next(answers)[0], asked) == ("a", ["a"])
    assert (next(answers)[0], asked) == ("b", ["a", "b"])
    assert (next(answers)[0], asked) == ("c", ["a", "b", "d", "c"])
    assert [client for client, _ in answers] == ["d"]


def test_a_thousand_clients_in_reverse_order() -> None:
    members = [f"{i:04d}" for i in range(1000)]
    answers = [(c, P["a"]) for c in reversed(members)]
    assert [client for client, _ in in_order(answers, members)] == members
