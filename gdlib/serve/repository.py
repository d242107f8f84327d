"""The models on disk: root/<name>/<version>/model.safetensors or model.onnx, watched for change.

Requests are answered from a dictionary, so no text that a client sends ever becomes a path. A file is loaded and tried before it takes
the place of the one that serves; one that cannot be loaded leaves that in service, and is reported with its reason. No request waits
for a load: a dictionary is never changed, but a new one put in its place, by one assignment. Of several processes each watches for
itself; what was unloaded by request they share through a file.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gdlib.serialization import write_atomically
from gdlib.serve.locks import locked
from gdlib.serve.models import ServedModel, load_native
from gdlib.serve.onnx import load_onnx

logger = logging.getLogger(__name__)

Loader = Callable[[Path], ServedModel]
NATIVE_FILE, ONNX_FILE = "model.safetensors", "model.onnx"
LOADERS: dict[str, Loader] = {NATIVE_FILE: load_native, ONNX_FILE: load_onnx}
LOAD_WAIT_SECONDS = 1.0  # of a request for a model that is being loaded; longer it would keep its thread from others
SETTLE_SECONDS = 0.3  # a file younger than this may still be being written
UNLOADED = "it was unloaded by request."
LOADING = "it is being loaded."
MAX_REASON = 500  # characters: some loaders list all that a file holds
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"0|[1-9][0-9]*")  # one spelling for each number: "01" would be a second version 1
_RESERVED = {"stats"}  # the statistics extension owns /v2/models/stats
FileStamp = tuple[int, int, int, int]  # inode, size and times: what changes when a file does
Stamp = tuple[tuple[str, FileStamp], ...]  # of each file of a version, since an .onnx file may keep its weights in others


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model. `model` serves, if there is one; `reason` says why not, or why a newer file is not it."""

    name: str
    version: str
    model: ServedModel | None
    reason: str = ""
    stamp: Stamp | None = None  # of the files that were looked at last; None: look again
    gone: bool = False  # its folder was missing when last looked for

    @property
    def state(self) -> str:
        return "UNAVAILABLE" if self.model is None else "READY"


Catalogue = dict[str, dict[str, ModelVersion]]  # name -> version -> model, versions in rising order


class StateError(OSError):
    """The file on which several processes agree cannot be written."""


class Repository:
    """The models under `root`. Raises NotADirectoryError when there is no such folder.

    `state_file` is where several processes agree on what is unloaded; without one the repository keeps that to itself.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        loaders: Mapping[str, Loader] = LOADERS,
        *,
        state_file: Path | None = None,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise NotADirectoryError(f"{root} is not a folder: pass one that holds <name>/<version>/model.safetensors.")
        self._loaders = loaders
        self._settle_seconds = settle_seconds
        self._state_file = state_file
        self._state_stamp: FileStamp | None = None
        self._unloaded: frozenset[str] = frozenset()
        self._wanted: frozenset[str] = frozenset()  # loaded by request in another process, and not yet here
        self._complaints: set[str] = set()  # said once, not at every look
        self._catalogue: Catalogue = {}
        self.forked()
        with self._lock:
            self._follow()
        self._scan(settle_seconds=0.0)
        # What was there at the start must load before the service is ready; what comes later must not take readiness away.
        self._awaited = frozenset(name for name, versions in self._catalogue.items() if versions and not _is_loaded(versions))

    def forked(self) -> None:
        """Make the locks anew in a child process: those of the parent may have been held by threads that are not here."""
        self._scanning = threading.Lock()  # held while the disk is looked at and models are loaded, which may take long
        self._lock = threading.Lock()  # held for an instant, where a new catalogue is made from the one before it

    @property
    def shared(self) -> bool:
        """Whether several processes agree on what is unloaded."""
        return self._state_file is not None

    def get(self, name: str, version: str | None = None) -> ModelVersion:
        """The version asked for, or the highest that is loaded, else the highest. Raises KeyError for what is not there."""
        versions = self._catalogue[name]
        if version is not None:
            return versions[version]
        for entry in reversed(versions.values()):
            if entry.model is not None:
                return entry
        return _newest(name, versions)

    def versions(self, name: str) -> list[str]:
        """The versions of a model that are loaded, in rising order; none for an unknown name."""
        return [entry.version for entry in self._catalogue.get(name, {}).values() if entry.model is not None]

    def index(self) -> Sequence[ModelVersion]:
        """Every version of every model; a model without versions is one entry whose version is empty."""
        return [entry for name, versions in self._catalogue.items() for entry in (versions.values() or [_newest(name, versions)])]

    def ready(self) -> bool:
        """Whether a model is loaded, and each that was there at the start has been, unless it is gone or unloaded by request."""
        catalogue, unloaded = self._catalogue, self._unloaded
        loaded = {name for name, versions in catalogue.items() if _is_loaded(versions)}
        self._awaited -= loaded
        return bool(loaded) and not any(name in catalogue and name not in unloaded for name in self._awaited)

    def refresh(self) -> None:
        """Look at the disk, and at what other processes have unloaded. May take as long as loading what is new."""
        with self._scanning:
            with self._lock:
                self._follow()
            self._scan(self._settle_seconds)

    def sync(self, name: str | None = None) -> None:
        """Follow the other processes, if there are any and they have changed something. One system call when they have not.

        A request for the model `name` that another process was asked to load loads it here. Where that is going on already it waits
        a little: whoever asked for the load has been told that it is done.
        """
        if self._state_file is None:
            return
        if _stamp_of(self._state_file) != self._state_stamp:
            with self._lock:
                self._follow()
        if name in self._wanted and self._scanning.acquire(timeout=LOAD_WAIT_SECONDS):
            try:
                if name in self._wanted:
                    self._look_at(name, 0.0)
            finally:
                self._scanning.release()

    def load(self, name: str) -> ModelVersion:
        """Serve the model again, from the files as they are now, and give its highest version.

        Raises KeyError when there is no such folder, OSError when that cannot be seen, StateError when the others cannot be told.
        """
        with self._scanning:
            if name not in self._names() or name in _RESERVED or not _NAME.fullmatch(name):  # a client's text becomes no path
                raise KeyError(name)
            with self._lock:
                self._agree(lambda unloaded: unloaded - {name})
            self._look_at(name, 0.0, again=True)
            return _newest(name, self._catalogue[name])

    def unload(self, name: str) -> None:
        """Stop serving the model and free its memory, until `load`. Raises KeyError for an unknown name, StateError as `load` does."""
        with self._lock:
            self._catalogue[name]
            self._agree(lambda unloaded: unloaded | {name})

    def _follow(self) -> None:
        """Take over what is unloaded from the file."""
        if self._state_file is None:
            return
        stamp = _stamp_of(self._state_file)
        if stamp is None:
            self._state_stamp = None
            return
        try:
            names = json.loads(self._state_file.read_bytes())["unloaded"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError("'unloaded' is not a list of names")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.error("%s cannot be read, and what was unloaded before stays so: %s", self._state_file, error)
        else:
            self._set_unloaded(frozenset(names))
        self._state_stamp = stamp  # only now: requests that find it out of date wait for the change, and do not see the models of before

    def _agree(self, change: Callable[[frozenset[str]], frozenset[str]]) -> None:
        """Change what is unloaded, here and for the other processes."""
        if self._state_file is None:
            self._set_unloaded(change(self._unloaded))
            return
        try:
            with locked(self._state_file.parent):
                self._follow()
                unloaded = change(self._unloaded)
                write_atomically(self._state_file, json.dumps({"unloaded": sorted(unloaded)}).encode())
                self._state_stamp = _stamp_of(self._state_file)
        except OSError as error:
            logger.error("What is unloaded cannot be written for the other processes: %s", error)
            raise StateError("the folder that the processes share cannot be written") from error
        self._set_unloaded(unloaded)

    def _set_unloaded(self, unloaded: frozenset[str]) -> None:
        wanted = self._unloaded - unloaded
        self._wanted = (self._wanted | wanted) - unloaded
        self._unloaded = unloaded
        changed = {
            name: _without_models(versions, UNLOADED if name in unloaded else LOADING)
            for name, versions in self._catalogue.items()
            if name in unloaded or name in wanted
        }
        if changed:
            self._catalogue = self._catalogue | changed

    def _scan(self, settle_seconds: float) -> None:
        try:
            names = self._names()
        except OSError as error:
            # A file system that is away for a moment: what is loaded serves on.
            self._complain("", "The models folder cannot be read, and the models that are loaded serve on: %s", error)
            return
        self._complaints.discard("")
        for name in sorted(names | self._catalogue.keys()):
            if name in _RESERVED or not _NAME.fullmatch(name):
                if not name.startswith("."):
                    self._complain(name, "The folder %r is left out: its name is reserved, or not letters, digits and ._- alone.", name)
            else:
                self._look_at(name, settle_seconds)

    def _names(self) -> set[str]:
        with os.scandir(self.root) as entries:
            return {entry.name for entry in entries if os.path.isdir(entry)}

    def _look_at(self, name: str, settle_seconds: float, *, again: bool = False) -> None:
        """Put what the disk holds of one model in the catalogue; `again`: load files that have not changed, too."""
        before = self._catalogue.get(name, {})
        folder = self.root / name
        try:
            with os.scandir(folder) as entries:
                found = {entry.name for entry in entries if _VERSION.fullmatch(entry.name) and os.path.isdir(entry)}
            self._complaints.discard(name)
        except OSError as error:
            if folder.is_dir():
                self._complain(name, "The folder of model %s cannot be read, and what is loaded serves on: %s", name, error)
                self._put(name, before)
                return
            found = set()
        versions = {}
        for version in sorted(found | before.keys(), key=int):
            entry = before.get(version)
            if version in found:
                versions[version] = self._look(name, version, replace(entry, stamp=None) if entry and again else entry, settle_seconds)
            elif entry is not None and not entry.gone:  # once more: a folder that is being removed or moved looks like this too
                versions[version] = replace(entry, gone=True)
        self._put(name, versions if versions or folder.is_dir() else None)

    def _put(self, name: str, versions: dict[str, ModelVersion] | None) -> None:
        with self._lock:
            self._wanted -= {name}
            if versions is not None and name in self._unloaded:  # perhaps only since the look began
                versions = _without_models(versions, UNLOADED)
            if versions == self._catalogue.get(name):
                return
            changed = {key: value for key, value in self._catalogue.items() if key != name}
            if versions is not None:
                changed[name] = versions
            self._catalogue = dict(sorted(changed.items()))

    def _look(self, name: str, version: str, before: ModelVersion | None, settle_seconds: float) -> ModelVersion:
        """The version as it should serve from now on, which is `before` as long as its file is the same."""
        if name in self._unloaded:
            return ModelVersion(name, version, None, UNLOADED)
        if before is not None and before.gone:
            before = replace(before, gone=False)
        folder = self.root / name / version
        stamp = _stamp_of_files(folder)
        if before is not None and stamp == before.stamp:
            return before
        now = time.time_ns()
        if any(0 <= now - mtime < settle_seconds * 1e9 for _, (_, _, mtime, _) in stamp):
            return before or ModelVersion(name, version, None, "its file is being written.")
        try:
            path = self._model_file(folder)
            model = self._loaders[path.name](path)
            if _stamp_of_files(folder) != stamp:
                raise ValueError("its file changed while it was read.")
        except (ValueError, OSError, ImportError) as error:
            # Clients read the reason, and where the folder lies is not their business.
            reason = str(error).replace(f"{self.root}{os.sep}", "")[:MAX_REASON]
            logger.warning("Model %s version %s cannot be loaded: %s", name, version, reason)
        except Exception:
            reason = "loading failed; the server's log says why."
            logger.exception("Model %s version %s cannot be loaded.", name, version)
        else:
            logger.info("Model %s version %s is loaded.", name, version)
            return ModelVersion(name, version, model, stamp=stamp)
        if before is not None and before.model is not None:
            reason = f"a newer file cannot be loaded, and the one before it serves on: {reason}"
        return ModelVersion(name, version, None if before is None else before.model, reason, stamp)

    def _model_file(self, folder: Path) -> Path:
        found = [folder / name for name in self._loaders if (folder / name).exists()]
        if len(found) != 1:
            has = "no model file" if not found else "more than one model file"
            raise FileNotFoundError(f"{folder} holds {has}; put one there, {' or '.join(self._loaders)}.")
        resolved = found[0].resolve()
        if not resolved.is_relative_to(self.root):
            raise ValueError(f"{found[0]} leads out of the models folder; copy the file into it.")
        if not resolved.is_file():
            raise FileNotFoundError(f"{found[0]} is no regular file; save a model there.")
        return found[0]

    def _complain(self, about: str, message: str, *arguments: object) -> None:
        if about not in self._complaints:
            self._complaints.add(about)
            logger.warning(message, *arguments)


def _newest(name: str, versions: dict[str, ModelVersion]) -> ModelVersion:
    if versions:
        return versions[next(reversed(versions))]
    return ModelVersion(name, "", None, "it has no version folder that can be read; save a model as <version>/model.safetensors.")


def _is_loaded(versions: dict[str, ModelVersion]) -> bool:
    return any(entry.model is not None for entry in versions.values())


def _without_models(versions: dict[str, ModelVersion], reason: str) -> dict[str, ModelVersion]:
    return {version: ModelVersion(entry.name, version, None, reason, gone=entry.gone) for version, entry in versions.items()}


def _stamp_of(path: str | os.PathLike[str]) -> FileStamp | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _stamp_of_files(folder: Path) -> Stamp:
    try:
        with os.scandir(folder) as entries:
            files = [(entry.name, _stamp_of(entry)) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((name, stamp) for name, stamp in files if stamp is not None))
