"""Access to a gateway: a file of tokens, one a line, each of any device or of the one named."""

import hashlib
import hmac
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from corolla.errors import ConfigError, WireError
from corolla.host import logs
from corolla.host.files import written
from corolla.phones import protocol

SHORTEST = 16
LONGEST = 256
_BEARER = "Bearer "
_log = logs.logger("tokens")


@dataclass(frozen=True)
class Token:
    """One line of the file. `owner` names it without telling it; `device`: "" for any."""

    owner: str
    device: str
    secret: str


def read_tokens(path: Path) -> Mapping[str, Token]:
    """Owner → token, of lines `TOKEN` or `TOKEN DEVICE`; # begins a comment. Raises ConfigError."""
    found, wrong = _right_lines(path)
    if wrong:
        raise ConfigError(wrong[0])
    if not found:
        raise ConfigError(f"{path} has no token: write one a line, made with openssl rand -hex 32")
    return found


def _right_lines(path: Path) -> tuple[dict[str, Token], list[str]]:
    """Owner → token of the lines that are right, and a message for each that is wrong.

    Raises ConfigError where the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"cannot read the tokens {path}: {reason}") from error
    found: dict[str, Token] = {}
    wrong: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            if (token := _token(line)) is None:
                continue
            if token.owner in found:
                raise ConfigError("this token is there twice")
            found[token.owner] = token
        except (ConfigError, WireError) as error:
            wrong.append(f"{path}, line {number}: {error}")
    return found, wrong


def _token(line: str) -> Token | None:
    """The token of a line, None where it has none. Raises ConfigError, WireError for its name."""
    secret, *device = line.partition("#")[0].split()[:3] or [""]
    if not secret:
        return None
    if not SHORTEST <= len(secret) <= LONGEST or not secret.isascii():
        raise ConfigError(
            f"a token has {SHORTEST} to {LONGEST} characters, found {len(secret)}: "
            f"make one with openssl rand -hex 32"
        )
    if len(device) > 1:
        raise ConfigError("expected TOKEN or TOKEN DEVICE")
    name = protocol.check_device(device[0]) if device else ""
    return Token(_owner(secret), name, secret)


class TokenFile(Mapping[str, Token]):
    """The tokens of a file as it is now; while it cannot be read, as it was before.

    A token that no longer stands there has no access, whatever else is wrong with the file: who
    takes a stolen one out and mistypes another line, or takes all of them out, has revoked it.
    While a line is wrong no device loses its name to others' tokens, for the line may be its own.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError."""
        self._path, self._seen = path, written(path)
        self._tokens = read_tokens(path)
        self._named = named(self._tokens)

    def __getitem__(self, owner: str) -> Token:
        self._read_again()
        return self._tokens[owner]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def names(self, device: str) -> bool:
        """Returns whether a device has a token of its own."""
        self._read_again()
        return device in self._named

    def _read_again(self) -> None:
        now = written(self._path)
        if now == self._seen:
            return
        self._seen = now
        try:
            self._tokens, wrong = _right_lines(self._path)
        except ConfigError as error:
            _log.warning("tokens left as they were", why=str(error))
            return
        self._named = named(self._tokens) | (self._named if wrong else frozenset())
        for why in wrong:
            _log.warning("this line of the tokens gives no access", why=why)
        if not self._tokens:
            _log.warning("no token is left: no device has access", path=str(self._path))


def named(tokens: Mapping[str, Token]) -> frozenset[str]:
    """Returns the devices that have tokens of their own: no other token gets their names."""
    return frozenset(token.device for token in tokens.values() if token.device)


def who(tokens: Mapping[str, Token], authorization: str) -> Token | None:
    """The token that an Authorization header names, "Bearer <token>"; None for an unknown one.

    Found by its hash, which an attacker cannot approach bit by bit, then compared in constant time.
    """
    if not authorization.startswith(_BEARER) or len(authorization) > LONGEST + len(_BEARER):
        return None
    secret = authorization.removeprefix(_BEARER)
    token = tokens.get(_owner(secret))
    matches = hmac.compare_digest(secret.encode(), (token.secret if token else "").encode())
    return token if matches else None


def _owner(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()[:32]
