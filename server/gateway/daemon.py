"""The gateway's process: phones over TLS on one side, on the other a trainer's socket.

    python -m corolla.server.gateway.daemon SOCKET < settings as one line of JSON

It prints one line once it serves, {"phones": ADDRESS, …}, or one line that says why not and exits
with 1 or 2. It ends with the process that started it.
"""

import json
import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from corolla.errors import CorollaError
from corolla.host import logs
from corolla.host.processes import when_orphaned
from corolla.server.gateway.access import TokenFile
from corolla.server.gateway.gateway import Gateway
from corolla.server.gateway.service import serve_phones
from corolla.server.gateway.settings import GatewaySettings, Policy
from corolla.wire import rpc

_CALLERS = 4
"""Tasks that are heard at a time: one that takes another's place must get through."""


@dataclass(frozen=True)
class GatewayOrder:
    """All that a gateway's process is told."""

    gateway: GatewaySettings
    listen: str
    certificate: Path
    key: Path
    tokens: Path

    def to_json(self) -> Mapping[str, object]:
        """For `from_json` in another process."""
        found: Mapping[str, object] = json.loads(json.dumps(asdict(self), default=str))
        return found

    @classmethod
    def from_json(cls, told: dict[str, str], gateway: dict[str, object]) -> "GatewayOrder":
        """Returns the GatewayOrder of which `to_json` made these values."""
        policy = Policy(**gateway.pop("policy"))  # type: ignore[arg-type]
        named = ("state", "share_model", "share_bundle", "publisher")
        paths = {name: Path(str(own)) for name in named if (own := gateway.pop(name))}
        settings = GatewaySettings(policy=policy, **{**gateway, **paths})  # type: ignore[arg-type]
        files = {name: Path(told[name]) for name in ("certificate", "key", "tokens")}
        return cls(settings, told["listen"], **files)


def main(socket: Path) -> int:
    """Serve until the parent ends; the exit code says why not."""
    told = json.loads(sys.stdin.buffer.readline())
    order = GatewayOrder.from_json(told, told.pop("gateway"))
    when_orphaned(lambda: os._exit(0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # each phone holds a connection, its upload a file
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        logs.configure(order.gateway.state / "gateway.jsonl")
        tokens = TokenFile(order.tokens)
        gateway = Gateway(order.gateway, known=tokens.__contains__, names=tokens.names)
        gateway.say = lambda line: print(f"note: {line}", flush=True)
        phones = serve_phones(gateway, tokens, order.listen, order.certificate, order.key)
        server = rpc.serve_trainer(gateway.answer, socket, workers=_CALLERS)
    except (CorollaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, CorollaError) else 1
    host = order.listen.rpartition(":")[0]
    print(json.dumps({"phones": f"{host}:{phones.port}", "tokens": len(tokens)}), flush=True)
    server.wait_for_termination()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
