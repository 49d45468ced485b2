"""Keyed ids, and the file of the key."""

import hashlib
import hmac
import os
import stat
from pathlib import Path

import pytest
from lungssl_data.ids import KeyFileError, keyed_id, load_key
from lungssl_data.pair import check_patient_id

KEY = bytes(range(32))


def test_an_id_is_a_keyed_hash_and_a_patient_id() -> None:
    expected = hmac.new(KEY, b"p\0Doe^Jane", hashlib.sha256).hexdigest()[:16]
    assert keyed_id("Doe^Jane", KEY) == f"p{expected}" == check_patient_id(f"p{expected}")
    assert keyed_id("Doe^Jane", KEY, prefix="s")[1:] != expected
    assert keyed_id("Doe^Jane", KEY[::-1]) != f"p{expected}"
    with pytest.raises(ValueError, match="a key of 3 bytes can be guessed"):
        keyed_id("x", b"abc")


def test_a_key_is_made_once_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUNGSSL_ID_KEY_FILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    key = load_key()
    file = tmp_path / "config" / "lungssl" / "id.key"
    assert len(key) == 32 and load_key() == key == file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["id.key"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "k"
    file.write_bytes(KEY)
    monkeypatch.setenv("LUNGSSL_ID_KEY_FILE", str(file))
    for mode in (0o640, 0o604):
        file.chmod(mode)
        with pytest.raises(KeyFileError, match=f"k: mode {mode:o} lets others at the key of the ids; run chmod 600"):
            load_key()
    file.chmod(0o600)
    assert load_key() == KEY == load_key(file)
    file.write_bytes(b"short")
    with pytest.raises(KeyFileError, match="is not a key, which has 32"):
        load_key()
    with pytest.raises(KeyFileError, match="gone: the key of the ids can't be read"):
        load_key(tmp_path / "gone")
