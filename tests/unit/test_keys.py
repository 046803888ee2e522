"""Keys: who may do what, and clear refusals that never show one."""

import logging
from hashlib import sha256
from pathlib import Path

import pytest
from pydantic import SecretStr

from mlx_server.keys import KeyRing, KeysError, warn_if_exposed


def secrets(*keys: str) -> list[SecretStr]:
    return [SecretStr(key) for key in keys]


def test_without_keys_nothing_is_guarded() -> None:
    ring = KeyRing.load()
    assert not ring.guards("inference")
    assert not ring.guards("admin")
    assert ring.find("anything") is None


def test_api_keys_alone_are_for_administrators_too() -> None:
    ring = KeyRing.load(secrets("user"))
    key = ring.find("user")
    assert key is not None
    assert key.permits("inference")
    assert key.permits("admin")
    assert ring.guards("admin")


def test_api_keys_are_for_inference_alone_beside_admin_keys() -> None:
    ring = KeyRing.load(secrets("user"), secrets("boss"))
    user, boss = ring.find("user"), ring.find("boss")
    assert user is not None
    assert boss is not None
    assert not user.permits("admin")
    assert boss.permits("inference")
    assert (user.name, boss.name) == ("key-0", "admin-0")


def test_admin_keys_alone_leave_inference_open() -> None:
    ring = KeyRing.load(admin_keys=secrets("boss"))
    assert ring.guards("admin")
    assert not ring.guards("inference")


def test_a_file_of_keys_guards_everything(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    digest = sha256(b"hashed").hexdigest()
    file.write_text(
        f'[[keys]]\nname = "alice"\nkey = "plain"\n[[keys]]\nname = "bob"\nsha256 = "{digest}"\n'
    )
    ring = KeyRing.load(keys_file=file)
    assert ring.guards("inference")
    assert ring.guards("admin")
    found = {shown: ring.find(shown) for shown in ("plain", "hashed", digest)}
    assert [key and key.name for key in found.values()] == ["alice", "bob", None]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", r"keys\.toml: keys: "),
        ("keys = 3", r"keys\.toml: keys: "),
        ("keys = []", r"keys\.toml: keys: "),
        ('[[keys]]\nname = "a"', "either key or sha256"),
        ('[[keys]]\nname = "a"\nkey = "s3cret"\nsha256 = "00"', "either key or sha256"),
        ('[[keys]]\nname = "a"\nkey = " "', "empty"),
        ('[[keys]]\nname = "a"\nsha256 = "s3cret"', "64 hexadecimal"),
        ('[[keys]]\nname = "a b"\nkey = "s3cret"', r"keys\.0\.name: "),
        ('[[keys]]\nname = "a"\nkey = "s3cret"\nscopes = ["root"]', r"keys\.0\.scopes\.0: "),
        ('[[keys]]\nname = "a"\nkey = "s3cret"\nscopes = []', r"keys\.0\.scopes: "),
        ('[[keys]]\nname = "a"\nkey = "s3cret"\nmore = 1', r"keys\.0\.more: "),
        ('[[keys]]\nname = "a"\nkey = "s3cret', "Unterminated"),
        ('[[keys]]\nname = "a"\nkey = "s3cret"\n' * 2, "two keys have the name a$"),
        (
            '[[keys]]\nname = "a"\nkey = "s3cret"\n[[keys]]\nname = "b"\nkey = "s3cret"\n',
            "the same key",
        ),
    ],
)
def test_a_wrong_file_is_refused_without_showing_a_key(
    tmp_path: Path, content: str, reason: str
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(content)
    with pytest.raises(KeysError, match=reason) as caught:
        KeyRing.load(keys_file=file)
    assert "s3cret" not in str(caught.value)


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="No such file"):
        KeyRing.load(keys_file=tmp_path / "keys.toml")
    (tmp_path / "keys.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(KeysError, match="not UTF-8"):
        KeyRing.load(keys_file=tmp_path / "keys.toml")


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(KeysError, match="api_keys: a key must not be empty"):
        KeyRing.load(secrets(" "))


def test_a_file_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.toml"
    file.touch(0o644)
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        warn_if_exposed(file)
        assert "keys_file_readable_by_others" in caplog.text
        caplog.clear()
        file.chmod(0o600)
        warn_if_exposed(file)
        warn_if_exposed(None)
    assert caplog.text == ""
