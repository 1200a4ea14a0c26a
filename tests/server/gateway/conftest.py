"""What tests of a gateway share: one whose time stands still, and phones that call it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server.gateway import gateways
from tests.server.gateway.callers import Caller
from tests.server.gateway.gateways import Clock, World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with gateways.serving(tmp_path, Clock(), seats=4) as found:
        yield found


@pytest.fixture
def caller(world: World) -> Iterator[Callable[..., Caller]]:
    with ExitStack() as stack:

        def make(device: str = "p1", token: str = gateways.TOKEN) -> Caller:
            made = Caller(world, device, token)
            stack.enter_context(made.channel)
            return made

        yield make
