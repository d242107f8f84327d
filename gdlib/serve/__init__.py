"""Serving saved models over HTTP with the Open Inference Protocol v2: a WSGI application, and a server to run it."""

import importlib.util

for _package, _name in (("orjson", "orjson"), ("simdjson", "pysimdjson")):
    if importlib.util.find_spec(_package) is None:
        raise ImportError(f"Serving needs the package {_name}: pip install gdlib[serve].")

from gdlib.serve.app import create_app  # noqa: E402 - after the check, whose error says what to do
from gdlib.serve.server import serve  # noqa: E402

__all__ = ["create_app", "serve"]
