"""Which tests one worker of pytest-xdist runs together, and in which order groups are begun.

A worker runs a whole file, so that what its tests share is made once. (Marks of `xdist_group` would
say it in the tests themselves: xdist 3.8 does not see them with pytest 9.2.)
"""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ALONE = (
    "e2e/test_client::test_whatever_dies",
    "e2e/test_deployment::",
    "e2e/test_flower::test_flwr_run",
    "e2e/test_private_deployment::",
    "e2e/test_readme::test_shell_examples",
    "e2e/test_server::test_sigterm",
    "e2e/test_server::test_whatever_is_killed",
)
"""How tests begin that share nothing with the others of their file and take long."""
BY_LAST_PARAMETER = ("strategies/test_common",)
"""Files whose fixtures depend on the last parameter of their tests."""
LONGEST = (
    "e2e/test_client::",
    "e2e/test_server::",
    "e2e/test_deploy_document",
    "e2e/test_deployment",
    "e2e/test_native_federation",
    "client/native/test_session_delivery",  # builds what others wait for
    "corolla/phones/test_lowering",  # compiles what others wait for
    "e2e/test_privacy_document",
    "e2e/test_readme",
    "e2e/test_flower",
    "e2e/test_compare",
    "e2e/test_faults",
    "e2e/test_zeroth_order",
    "e2e/test_simulate",
    "e2e/",
    "client/native/",
    "corolla/commands/",
    "client/training/test_dpsgd",
    "client/device/test_daemon",
)
"""How groups begin that take longest, in the order in which they are begun."""


def group(nodeid: str) -> str:
    """The name of the tests that one worker runs together with this one."""
    place = nodeid.removeprefix("tests/").replace(".py::", "::", 1)
    file, _, test = place.partition("::")
    if place.startswith(ALONE):
        return place
    if file in BY_LAST_PARAMETER:
        return f"{file}::{test.rstrip(']').rpartition('[')[2].rpartition('-')[2]}"
    return f"{file}::"


def place(nodeid: str) -> int:
    """Tests of a lower number are begun earlier."""
    found = group(nodeid)
    places = (number for number, start in enumerate(LONGEST) if found.startswith(start))
    return next(places, len(LONGEST))


class Groups(LoadScopeScheduling):  # type: ignore[misc]  # xdist says no types
    """Hands out groups in the order of collection."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
