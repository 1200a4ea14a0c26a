"""How much memory the reply of one member may take."""

from corolla.server.deployment.limits import Limits

MIB = 1 << 20


def test_a_gateway_that_sends_sums_gets_no_more_room_for_the_seats_that_it_says_it_has() -> None:
    bundles, sums = Limits(update=4 * MIB), Limits(update=4 * MIB, sums=4)
    assert bundles.reply(0) == sums.reply(0) == sums.reply(1) == (64 + 17) * MIB
    assert bundles.reply(1024) == (64 + 1024 * 17) * MIB
    assert sums.reply(1024) == (64 + 4 * 17) * MIB
