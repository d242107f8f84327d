"""`gdlib.serve.wsgi:application`, for servers that import a callable: gunicorn, granian, uWSGI. The environment holds its settings.

GDLIB_MODELS is the folder of models, without which nothing is served; the others are the arguments of `create_app`: GDLIB_KEYS (a file),
GDLIB_ADMIN (1 or 0), GDLIB_ALLOWED_HOSTS (names after commas), GDLIB_ACCESS_LOG (a file, or - for standard output), GDLIB_STATE_DIR
(a folder that all processes share), GDLIB_MAX_IN_FLIGHT and GDLIB_BATCH_WINDOW (seconds). A setting that is there and empty is an error:
a forgotten value of GDLIB_KEYS must not open the server.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from gdlib.serve.app import App, create_app


def _text(name: str, value: str) -> str:
    return value


def _switch(name: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(f"{name} is {value!r}: set it to 1 or 0.")
    return value == "1"


def _names(name: str, value: str) -> list[str]:
    names = [part.strip() for part in value.split(",")]
    if not all(names):
        raise ValueError(f"{name} is {value!r}, in which a name is empty: set it to host names with one comma between each two.")
    return names


def _count(name: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and int(value) >= 1):
        raise ValueError(f"{name} is {value!r}: set it to a whole number of 1 or more.")
    return int(value)


def _seconds(name: str, value: str) -> float:
    try:
        return float(value)  # create_app says which are too many
    except ValueError:
        raise ValueError(f"{name} is {value!r}: set it to a number of seconds.") from None


_SETTINGS: dict[str, Callable[[str, str], Any]] = {
    "GDLIB_KEYS": _text,
    "GDLIB_ADMIN": _switch,
    "GDLIB_ALLOWED_HOSTS": _names,
    "GDLIB_ACCESS_LOG": _text,
    "GDLIB_STATE_DIR": _text,
    "GDLIB_MAX_IN_FLIGHT": _count,
    "GDLIB_BATCH_WINDOW": _seconds,
}


def from_environment(environ: Mapping[str, str]) -> App:
    """The application that these variables describe. Raises ValueError naming a variable, and what `create_app` raises."""
    found = {name: environ[name] for name in ("GDLIB_MODELS", *_SETTINGS) if name in environ}
    if "GDLIB_MODELS" not in found:
        raise ValueError("GDLIB_MODELS is not set: set it to the folder of models, which holds <name>/<version>/model.safetensors.")
    for name, value in found.items():
        if not value.strip():
            raise ValueError(f"{name} is empty: give it a value, or leave it out.")
    models = found.pop("GDLIB_MODELS")
    return create_app(models, **{name.removeprefix("GDLIB_").lower(): _SETTINGS[name](name, value) for name, value in found.items()})


application = from_environment(os.environ)
