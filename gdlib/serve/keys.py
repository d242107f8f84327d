"""Access keys: a file of names, hashes and scopes, read again whenever it changes, so that keys come and go without a restart.

A key is 256 random bits, which nobody can guess: one round of SHA-256 hides it, and no slow hash is needed. The file never holds the
key itself. A file that is missing lets nobody in; one that cannot be read as keys leaves those in force that were read last.
Scopes: `models:NAME` or `models:*` (infer, metadata and statistics of a model), `metrics`, and `admin` (load and unload).
"""

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdlib.serialization import write_atomically
from gdlib.serve.locks import locked

logger = logging.getLogger(__name__)

ALL_MODELS = "models:*"
METRICS, ADMIN = "metrics", "admin"
_SCOPE = re.compile(r"models:(\*|[A-Za-z0-9][A-Za-z0-9._-]*)|metrics|admin")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIX = "gdlib_"  # lets secret scanners find a key that was published by mistake


@dataclass(frozen=True)
class Key:
    """One key as the file holds it."""

    name: str
    sha256: str
    scopes: frozenset[str]
    created: str

    def allows_model(self, model: str) -> bool:
        return ALL_MODELS in self.scopes or f"models:{model}" in self.scopes

    def allows(self, scope: str) -> bool:
        return scope in self.scopes


class KeyFile:
    """The keys in a file, for a server: `find` reads it again when it has changed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] | None = None
        self._keys: tuple[Key, ...] = ()
        self._keys = read_keys(self._path)  # at the start a file that is missing or wrong is an error

    def find(self, secret: str) -> Key | None:
        """The key whose secret this is. Takes the same time whichever characters are wrong."""
        self._refresh()
        digest = hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
        found = None
        for key in self._keys:  # all of them, always
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _refresh(self) -> None:
        stamp: tuple[int, ...] = ()
        try:
            status = os.stat(self._path)
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except OSError:
            pass
        if stamp == self._stamp:
            return
        with self._lock:
            if stamp == self._stamp:
                return
            try:
                self._keys = read_keys(self._path)
            except FileNotFoundError:
                self._keys = ()
                logger.error("The key file %s is missing: nobody is let in until it is back.", self._path)
            except (OSError, ValueError) as error:
                logger.error("The key file cannot be used, and the keys read before stay in force: %s", error)
            self._stamp = stamp


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file. Raises FileNotFoundError, OSError, and ValueError saying what is wrong with it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no key file at {path}: make one with `gdlib keys add`.") from None
    try:
        entries = json.loads(content.decode("utf-8"))["keys"]
        keys = tuple(_as_key(entry) for entry in entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} holds no keys as `gdlib keys` writes them ({type(error).__name__}: {error}); mend it.") from None
    if len({key.name for key in keys}) != len(keys):
        raise ValueError(f"{path} names a key twice; mend it.")
    return keys


def add_key(path: Path, name: str, scopes: Iterable[str]) -> str:
    """Add a key and give its secret, which is kept nowhere. Raises ValueError for a name in use, a bad name and an unknown scope."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"the key's name is {name!r}; use up to 64 letters, digits and ._- (it stands in the access log).")
    scopes = list(scopes)
    for scope in scopes:
        _check_scope(scope)
    secret = _PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        keys = read_keys(path) if path.exists() else ()
        if any(key.name == name for key in keys):
            raise ValueError(f"{path} has a key {name!r} already; revoke it first, or choose another name.")
        _write(path, (*keys, Key(name, digest, frozenset(scopes), created)))
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of the file. Raises ValueError when it is not there."""
    if not path.exists():
        read_keys(path)  # says what is missing, the folder perhaps
    with locked(path.parent):
        keys = read_keys(path)
        kept = tuple(key for key in keys if key.name != name)
        if len(kept) == len(keys):
            raise ValueError(f"{path} has no key {name!r}; it has {', '.join(repr(key.name) for key in keys) or 'none'}.")
        _write(path, kept)


def _write(path: Path, keys: Iterable[Key]) -> None:
    entries = [{"name": key.name, "sha256": key.sha256, "scopes": sorted(key.scopes), "created": key.created} for key in keys]
    write_atomically(path, json.dumps({"keys": entries}, indent=2).encode() + b"\n")


def _as_key(entry: dict[str, Any]) -> Key:
    if set(entry) != {"name", "sha256", "scopes", "created"} or not all(
        isinstance(entry[key], str) for key in ("name", "sha256", "created")
    ):
        raise ValueError("an entry is not {name, sha256, scopes, created}")
    if not _NAME.fullmatch(entry["name"]) or not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) or not isinstance(entry["scopes"], list):
        raise ValueError(f"the entry {entry['name']!r} has a bad name, hash or list of scopes")
    for scope in entry["scopes"]:
        _check_scope(scope)
    return Key(entry["name"], entry["sha256"], frozenset(entry["scopes"]), entry["created"])


def _check_scope(scope: Any) -> None:
    if not isinstance(scope, str) or not _SCOPE.fullmatch(scope):
        raise ValueError(f"the scope is {scope!r}; use models:NAME, {ALL_MODELS}, {METRICS} or {ADMIN}.")
