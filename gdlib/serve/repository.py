"""The models on disk: root/<name>/<version>/model.safetensors or model.onnx, watched for change.

Requests are answered from a dictionary, so no text that a client sends ever becomes a path. A file is loaded and tried before it takes
the place of the one that serves; one that cannot be loaded leaves that in service, and is reported with its reason. `scan` builds a new
dictionary from the old one and the disk, and putting it in place is one assignment. Of several processes each watches for itself;
what was unloaded by request they share through a file.
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
from gdlib.serve.models import ServedModel, load_native
from gdlib.serve.onnx import load_onnx

logger = logging.getLogger(__name__)

Loader = Callable[[Path], ServedModel]
LOADERS: dict[str, Loader] = {"model.safetensors": load_native, "model.onnx": load_onnx}
SETTLE_SECONDS = 0.3  # a file younger than this may still be being written
UNLOADED = "it was unloaded by request."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"0|[1-9][0-9]*")  # one spelling for each number: "01" would be a second version 1
_RESERVED = {"stats"}  # the statistics extension owns /v2/models/stats
Stamp = tuple[tuple[int, int, int, int], ...]  # inode, size and times of each model file: what changes when a file does


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
        self._unloaded: frozenset[str] = frozenset()
        self._lock = threading.Lock()  # held while the disk is looked at
        self._catalogue: Catalogue = {}
        self._state_stamp = self._read_state()
        self._scan(settle_seconds=0.0)
        # What was there at the start must load before the service is ready; what comes later must not take it down.
        self._required = {name for name, versions in self._catalogue.items() if versions}

    @property
    def shared(self) -> bool:
        """Whether several processes agree on what is unloaded."""
        return self._state_file is not None

    def get(self, name: str, version: str | None = None) -> ModelVersion:
        """The version asked for, or the highest that is loaded, else the highest. Raises KeyError for what is not there."""
        versions = self._catalogue[name]
        if version is not None:
            return versions[version]
        newest = None
        for entry in reversed(versions.values()):
            if entry.model is not None:
                return entry
            newest = newest or entry
        return newest or ModelVersion(
            name, "", None, "it has no version folder that can be read; save a model as <version>/model.safetensors."
        )

    def versions(self, name: str) -> list[str]:
        """The versions of a model that are loaded, in rising order. Raises KeyError for an unknown name."""
        return [entry.version for entry in self._catalogue[name].values() if entry.model is not None]

    def index(self) -> Sequence[ModelVersion]:
        """Every version of every model; a model without versions is one entry whose version is empty."""
        catalogue = self._catalogue
        return [entry for name, versions in catalogue.items() for entry in (versions.values() or [self.get(name)])]

    def ready(self) -> bool:
        """Whether a model is loaded, and each that was there at the start and is still wanted."""
        catalogue = self._catalogue
        loaded = {name for name, versions in catalogue.items() if any(entry.model is not None for entry in versions.values())}
        return bool(loaded) and all(name in loaded for name in self._required if name in catalogue and name not in self._unloaded)

    def refresh(self) -> None:
        """Look at the disk, and at what other processes have unloaded."""
        with self._lock:
            stamp = self._read_state()
            self._scan(self._settle_seconds)
            self._state_stamp = stamp  # only now: other threads that ask before this wait for the scan, too

    def sync(self) -> None:
        """Follow the other processes, if there are any and they have changed something. One system call when they have not."""
        if self._state_file is not None and _stamp_of(self._state_file) != self._state_stamp:
            self.refresh()

    def load(self, name: str) -> ModelVersion:
        """Serve the model again, from the files as they are now. Raises KeyError when there is no such folder."""
        with self._lock:
            self._write_state(self._unloaded_on_disk() - {name})
            versions = self._catalogue.get(name, {})
            forgotten = {version: replace(entry, stamp=None) for version, entry in versions.items()}
            self._catalogue = self._catalogue | ({name: forgotten} if forgotten else {})
            self._scan(settle_seconds=0.0)
            return self.get(name)

    def unload(self, name: str) -> None:
        """Stop serving the model and free its memory, until `load`. Raises KeyError for an unknown name."""
        with self._lock:
            self._catalogue[name]
            self._write_state(self._unloaded_on_disk() | {name})
            self._scan(self._settle_seconds)

    def _read_state(self) -> tuple[int, int, int, int] | None:
        """Learn what is unloaded, and give the stamp of the file that says so."""
        if self._state_file is None:
            return None
        stamp = _stamp_of(self._state_file)
        self._unloaded = self._unloaded_on_disk()
        return stamp

    def _unloaded_on_disk(self) -> frozenset[str]:
        if self._state_file is None or not self._state_file.exists():
            return self._unloaded
        return frozenset(json.loads(self._state_file.read_text())["unloaded"])

    def _write_state(self, unloaded: frozenset[str]) -> None:
        if self._state_file is not None:
            write_atomically(self._state_file, json.dumps({"unloaded": sorted(unloaded)}).encode())
            self._state_stamp = _stamp_of(self._state_file)
        self._unloaded = unloaded

    def _scan(self, settle_seconds: float) -> None:
        try:
            folders = {path.name: path for path in self.root.iterdir() if path.is_dir()}
        except OSError:
            # A file system that is away for a moment: what is loaded serves on.
            logger.error("The models folder %s cannot be read; the models that are loaded serve on.", self.root)
            return
        catalogue: Catalogue = {}
        for name in sorted(folders.keys() | self._catalogue.keys()):
            if not _NAME.fullmatch(name) or name in _RESERVED:
                continue
            before = self._catalogue.get(name, {})
            try:
                found = {path.name for path in folders[name].iterdir() if path.is_dir() and _VERSION.fullmatch(path.name)}
            except (OSError, KeyError):
                found = set()
            versions = {}
            for version in sorted(found | before.keys(), key=int):
                entry = before.get(version)
                if version in found:
                    versions[version] = self._look(name, version, entry, settle_seconds)
                elif entry is not None and not entry.gone:  # once more: a folder that is being removed or moved looks like this too
                    versions[version] = replace(entry, gone=True)
            if versions or name in folders:
                catalogue[name] = versions
        self._catalogue = catalogue

    def _look(self, name: str, version: str, before: ModelVersion | None, settle_seconds: float) -> ModelVersion:
        """The version as it should serve from now on, which is `before` as long as its file is the same."""
        if name in self._unloaded:
            return ModelVersion(name, version, None, UNLOADED)
        folder = self.root / name / version
        stamp = self._stamp(folder)
        if before is not None and stamp == before.stamp:
            return replace(before, gone=False) if before.gone else before
        if any(0 <= time.time() - mtime_ns * 1e-9 < settle_seconds for _, _, mtime_ns, _ in stamp):
            return before or ModelVersion(name, version, None, "its file is being written.")
        try:
            path = self._model_file(folder)
            model = self._loaders[path.name](path)
            if self._stamp(folder) != stamp:
                raise ValueError("its file changed while it was read.")
        except (ValueError, OSError, ImportError) as error:
            # Clients read the reason, and where the folder lies is not their business.
            reason = str(error).replace(f"{self.root}{os.sep}", "")
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

    def _stamp(self, folder: Path) -> Stamp:
        return tuple(stamp for name in self._loaders if (stamp := _stamp_of(folder / name)) is not None)

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


def _stamp_of(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
