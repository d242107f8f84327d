"""The models on disk: models_dir/<name>/<version>/model.safetensors, read once at the start and then looked up by name.

Requests are answered from a dictionary, so no text that a client sends ever becomes a path. A file that cannot be loaded is kept
with its reason, and the others are served. `scan` builds a new dictionary and `Repository` holds one, so that replacing what is
served is one assignment; nothing watches the folder yet.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gdlib.serialization import load as load_model

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"0|[1-9][0-9]*")  # one spelling for each number: "01" would be a second version 1
_RESERVED = {"stats"}  # the statistics extension owns /v2/models/stats


class Model(Protocol):
    """What serving needs of a model; `gdlib.Linear` and `gdlib.Sequential` are such."""

    in_features: int
    out_features: int
    dtype: np.dtype[Any]
    feature_names: list[str] | None
    target_names: list[str] | None

    def predict(self, x: Any, /) -> NDArray[Any]: ...


Loader = Callable[[Path], Model]


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model: loaded, or the reason why it is not."""

    name: str
    version: str
    model: Model | None
    reason: str = ""

    @property
    def state(self) -> str:
        return "UNAVAILABLE" if self.model is None else "READY"


Catalogue = dict[str, dict[str, ModelVersion]]  # name -> version -> model, versions in rising order


def scan(root: Path, load: Loader) -> Catalogue:
    """Load every version of every model under `root`. Folders whose names are no model or version names are left out."""
    catalogue: Catalogue = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if not _NAME.fullmatch(folder.name) or folder.name in _RESERVED:
            if not folder.name.startswith("."):
                logger.warning("The folder %r is no model: a name is letters, digits and ._-, and not 'stats'.", folder.name)
            continue
        try:
            versions = sorted((path.name for path in folder.iterdir() if path.is_dir() and _VERSION.fullmatch(path.name)), key=int)
        except OSError:
            logger.exception("The folder %r cannot be read.", folder.name)
            versions = []
        catalogue[folder.name] = {version: _load(root, folder.name, version, load) for version in versions}
    return catalogue


def _load(root: Path, name: str, version: str, load: Loader) -> ModelVersion:
    path = root / name / version / MODEL_FILE
    try:
        resolved = path.resolve()
        if not resolved.is_relative_to(root):
            raise ValueError(f"{path} leads out of the models folder; copy the file into it.")
        if not resolved.is_file():
            raise FileNotFoundError(f"{path} is missing or no regular file; save a model there.")
        return ModelVersion(name, version, load(resolved))
    except (ValueError, OSError) as error:
        # Clients read the reason, and where the folder lies is not their business.
        reason = str(error).replace(f"{root}{os.sep}", "")
        logger.warning("Model %s version %s is unavailable: %s", name, version, reason)
    except Exception:
        reason = "loading failed; the server's log says why."
        logger.exception("Model %s version %s is unavailable.", name, version)
    return ModelVersion(name, version, None, reason)


class Repository:
    """The models under `root`, loaded by `load`. Raises NotADirectoryError when there is no such folder."""

    def __init__(self, root: str | os.PathLike[str], load: Loader = load_model) -> None:
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise NotADirectoryError(f"{root} is not a folder: pass one that holds <name>/<version>/{MODEL_FILE}.")
        self._catalogue = scan(self.root, load)

    def get(self, name: str, version: str | None = None) -> ModelVersion:
        """The version asked for, or the highest one, loaded or not. Raises KeyError for what is not there.

        The highest version is the default even when it could not be loaded: to answer from an older model without being asked to
        would hide the failure.
        """
        versions = self._catalogue[name]
        if version is not None:
            return versions[version]
        if not versions:
            return ModelVersion(name, "", None, "it has no version folder that can be read; save a model as <version>/model.safetensors.")
        return next(reversed(versions.values()))

    def versions(self, name: str) -> list[str]:
        """The versions of a model that are loaded, in rising order. Raises KeyError for an unknown name."""
        return [entry.version for entry in self._catalogue[name].values() if entry.model is not None]

    def index(self) -> Sequence[ModelVersion]:
        """Every version of every model; a model without versions is one entry whose version is empty."""
        catalogue = self._catalogue
        return [entry for name, versions in catalogue.items() for entry in (versions.values() or [self.get(name)])]

    def ready(self) -> bool:
        """Whether there is a model, and every model that has versions has its default one loaded."""
        catalogue = self._catalogue
        defaults = [self.get(name) for name, versions in catalogue.items() if versions]
        return bool(defaults) and all(entry.model is not None for entry in defaults)
