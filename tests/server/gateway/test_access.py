"""The file of tokens, and whose a token is."""

from pathlib import Path

import pytest

from corolla.errors import ConfigError
from corolla.server.gateway.access import TokenFile, read_tokens, who

A, B = "a" * 32, "b" * 32


def test_a_token_is_of_any_device_or_of_one(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# ours\n{A}   # all\n\n{B} p2\n")
    tokens = read_tokens(path)
    for secret, device in ((A, ""), (B, "p2")):
        found = who(tokens, f"Bearer {secret}")
        assert found
        assert found.device == device
        assert secret not in found.owner


@pytest.mark.parametrize(
    "said",
    [
        "",
        "Bearer ",
        "Bearer",
        f"bearer {A}",
        f"Basic {A}",
        f"Bearer  {A}",
        f"Bearer {A} ",
        A,
        f"Bearer {A[:-1]}",
        f"Bearer {A}a",
        "Bearer " + "x" * 100000,
        "Bearer é" + "a" * 20,
    ],
)
def test_nothing_else_is_anybodys(said: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(A)
    assert who(read_tokens(path), said) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no token"),
        ("# nothing\n", "has no token"),
        ("short\n", "line 1: a token has 16 to 256 characters, found 5"),
        (f"{A}\n{A} p1\n", "line 2: this token is there twice"),
        (f"{A} p1 p2\n", "line 1: expected TOKEN or TOKEN DEVICE"),
        (f"{A} p/1\n", "line 1: a device's name"),
        ("ä" * 20, "line 1"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_in_one_line(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        read_tokens(path)
    assert "\n" not in str(caught.value)
    assert A not in str(caught.value)


def test_a_file_that_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_tokens(tmp_path / "tokens")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="it is no text"):
        read_tokens(tmp_path / "binary")


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(A + "\n")
    tokens = TokenFile(path)
    assert who(tokens, f"Bearer {A}")
    assert who(tokens, f"Bearer {B}") is None
    path.write_text(f"{B} p2\n")
    assert who(tokens, f"Bearer {A}") is None
    assert who(tokens, f"Bearer {B}")
    assert tokens.names("p2")
    path.unlink()
    assert who(tokens, f"Bearer {B}")


@pytest.mark.parametrize("text", [f"{A} p1\nshort\n", f"short\n{A} p1\n", f"{A} p1\n{A}\n"])
def test_a_wrong_line_neither_keeps_a_revoked_token_nor_takes_others_along(
    text: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{A} p1\n{B}\n")
    tokens = TokenFile(path)
    path.write_text(text)
    assert who(tokens, f"Bearer {A}")
    assert who(tokens, f"Bearer {B}") is None


@pytest.mark.parametrize("text", ["", "# none at the moment\n", "short\n"])
def test_a_file_without_a_token_revokes_all(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{A} p1\n{B}\n")
    tokens = TokenFile(path)
    path.write_text(text)
    assert [who(tokens, f"Bearer {secret}") for secret in (A, B)] == [None, None]


@pytest.mark.parametrize(("line", "named"), [("short p1\n", True), ("", False)])
def test_a_mistyped_line_does_not_give_its_device_to_the_tokens_of_others(
    line: str, named: bool, tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{A} p1\n{B}\n")
    tokens = TokenFile(path)
    path.write_text(line + f"{B}\n")
    assert who(tokens, f"Bearer {B}")
    assert tokens.names("p1") == named
    path.write_text(f"{B}\n#\n")
    assert who(tokens, f"Bearer {B}")
    assert not tokens.names("p1")
