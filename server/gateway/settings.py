"""The settings of a gateway that its owner decides, and the policy that it asks of its phones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corolla.wire.messages import Capabilities


@dataclass(frozen=True)
class Policy:
    """The conditions on phones: the fields of the message Policy; 0 sets no condition.

    Each phone decides itself. What it reports anyway is looked at here too, once more; how warm it
    is, what it has done before and what it has used today it tells nobody.
    """

    charging: bool = True
    unmetered: bool = True
    idle: bool = True
    battery_percent: int = 0
    thermal: int = 0
    storage_bytes: int = 0
    examples: int = 0
    separation: int = 0
    period_seconds: float = 0.0
    daily_bytes: int = 0
    daily_seconds: float = 0.0
    daily_battery_percent: float = 0.0

    def lacks(self, device: Capabilities) -> str:
        """Returns the conditions that a device does not meet, in words; "" when it is eligible.

        A battery or a disk of 0 is not known: their owner's device looks itself.
        """
        battery, storage = device.battery_percent, device.storage_bytes
        low = not device.charging and 0 < battery < self.battery_percent
        full = 0 < storage < self.storage_bytes
        met = {
            "charging": device.charging or not self.charging,
            "on an unmetered network": not (device.metered and self.unmetered),
            "idle": device.idle or not self.idle,
            f"charged to {self.battery_percent} % (found {battery})": not low,
            f"left with {self.storage_bytes} bytes of storage (found {storage})": not full,
        }
        return ", ".join(name for name, is_met in met.items() if not is_met)


@dataclass(frozen=True)
class GatewaySettings:
    """Settings that a gateway's owner decides. `seats` 0: as many as eligible phones were seen."""

    name: str
    state: Path
    policy: Policy = field(default_factory=Policy)
    over_select: float = 1.3
    seats: int = 0
    retry: float = 10.0
    """Seconds between two check-ins of a phone, on average."""
    lease: float = 60.0
    """Seconds that a phone may be silent."""
    share_model: Path | None = None
    share_bundle: Path | None = None
    publisher: Path | None = None
    """The public key that the bundle must be signed with; None: phones alone look at that."""
    allow: Sequence[str] = ()

    def client(self, device: str) -> str:
        """The name that a phone of this gateway has as a client of its server."""
        return f"{self.name}/{device}"
