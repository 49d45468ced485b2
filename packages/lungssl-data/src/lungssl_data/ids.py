"""Patient ids that nobody without the lab's key can trace back: HMAC-SHA256, never a bare hash.

A bare hash of a hospital number is found by trying all numbers (`domain.md` G1). The key never leaves its file; with
another key the same patient gets another id.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

ID_DIGITS = 16
"""Hexadecimal digits, 64 bits: among a million ids of one kind, the odds of any two being equal are 3e-8."""
KEY_BYTES = 32
"""RFC 2104: no less than the hash's 32 bytes of output."""
LARGEST_KEY_BYTES = 4096


class KeyFileError(ValueError):
    """The file of the key can't be used; the message says what to do, never what it holds."""


def keyed_id(text: str, key: bytes, *, prefix: str = "p") -> str:
    """`prefix` and ID_DIGITS hexadecimal digits: equal for equal `text`, `key` and `prefix`, else unrelated."""
    if len(key) < KEY_BYTES:
        raise ValueError(f"a key of {len(key)} bytes can be guessed, {KEY_BYTES} are needed; use load_key()")
    # A file's name on Linux may be no UTF-8; Python hands its odd bytes on as surrogates, which plain UTF-8 refuses.
    content = f"{prefix}\0{text}".encode("utf-8", "surrogateescape")
    return prefix + hmac.new(key, content, hashlib.sha256).hexdigest()[:ID_DIGITS]


def ids_of(key: bytes) -> str:
    """What a cache keeps to know its ids again: that they are keyed, and a fingerprint of the key."""
    return f"keyed by {keyed_id('', key, prefix='key')}"


def load_key(path: Path | None = None) -> bytes:
    """The key in `path`, else in $LUNGSSL_ID_KEY_FILE, else in the user's configuration folder, made there if absent.

    Raises KeyFileError for a file that others may read, that is too short, or that was named and does not exist.
    """
    named = path or (Path(value) if (value := os.environ.get("LUNGSSL_ID_KEY_FILE")) else None)
    if named is None:
        base = os.environ.get("XDG_CONFIG_HOME")
        named = (Path(base) if base else Path.home() / ".config") / "lungssl" / "id.key"
        _create(named)
    try:
        with named.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if os.name == "posix" and mode & 0o077:
                raise KeyFileError(
                    f"{named.name}: mode {mode:03o} lets others at the key of the ids; run chmod 600 on it"
                )
            key = file.read(LARGEST_KEY_BYTES + 1)
    except OSError as error:
        raise KeyFileError(
            f"{named.name}: the key of the ids can't be read; correct LUNGSSL_ID_KEY_FILE, or unset it to have one made"
        ) from error
    if not KEY_BYTES <= len(key) <= LARGEST_KEY_BYTES:
        raise KeyFileError(f"{named.name}: is not a key, which has {KEY_BYTES} to {LARGEST_KEY_BYTES} bytes")
    return key


def _create(path: Path) -> None:
    """Write a new key unless there is one; of two processes that do so at once, both then read the same."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, fails where another process was first
    except FileExistsError:
        pass
    except OSError as error:
        raise KeyFileError(
            f"{path.name}: the key of the ids can't be made in the user's configuration folder; make a file of "
            f"{KEY_BYTES} random bytes and name it in LUNGSSL_ID_KEY_FILE"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
