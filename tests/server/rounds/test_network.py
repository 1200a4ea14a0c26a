"""What a network says of its members that does not know better."""

from typing import Any

from corolla.server.rounds.network import Network


def test_a_network_inherits_that_all_are_there() -> None:
    class Two(Network):
        def clients(self) -> dict[str, int]:
            return {"ann": 1, "bob": 2}

        def ask(self, packets: Any) -> Any:
            return []

    assert Two().online() == {"ann", "bob"}
    assert Two().seats() == {}
