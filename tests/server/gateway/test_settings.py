"""What a gateway asks of phones: which of it a device lacks, and that its message can say it."""

from dataclasses import replace

import pytest

from corolla.proto import device_pb2 as pb
from corolla.server.gateway.settings import Policy
from corolla.wire.messages import Capabilities

ABLE = Capabilities(charging=True, metered=False, idle=True)


@pytest.mark.parametrize(
    ("device", "lacks"),
    [
        (ABLE, ""),
        (replace(ABLE, charging=False), "charging"),
        (replace(ABLE, metered=True), "on an unmetered network"),
        (replace(ABLE, idle=False, charging=False), "charging, idle"),
    ],
)
def test_a_policy_says_what_a_device_lacks(device: Capabilities, lacks: str) -> None:
    assert Policy().lacks(device) == lacks
    assert Policy(charging=False, unmetered=False, idle=False).lacks(device) == ""


@pytest.mark.parametrize(
    ("policy", "device", "lacks"),
    [
        (Policy(battery_percent=20), replace(ABLE, battery_percent=5), ""),  # it is charging
        (
            Policy(charging=False, battery_percent=20),
            replace(ABLE, charging=False, battery_percent=19),
            "charged to 20 % (found 19)",
        ),
        (
            Policy(charging=False, battery_percent=20),
            replace(ABLE, charging=False, battery_percent=20),
            "",
        ),
        (Policy(charging=False, battery_percent=20), replace(ABLE, battery_percent=0), ""),
        (
            Policy(storage_bytes=100),
            replace(ABLE, storage_bytes=99),
            "left with 100 bytes of storage (found 99)",
        ),
        (Policy(storage_bytes=100), replace(ABLE, storage_bytes=0), ""),  # it is not known
        (Policy(thermal=1, separation=9, period_seconds=9, daily_bytes=1), ABLE, ""),  # its own
    ],
)
def test_what_a_device_reports_anyway_is_looked_at_once_more(
    policy: Policy, device: Capabilities, lacks: str
) -> None:
    assert policy.lacks(device) == lacks


def test_a_policy_has_the_fields_of_its_message() -> None:
    fields = {field.name for field in pb.Policy.DESCRIPTOR.fields}
    assert vars(Policy()).keys() == fields
    assert pb.Policy(**vars(Policy())) == pb.Policy(charging=True, unmetered=True, idle=True)
