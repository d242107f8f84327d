"""Serving saved models over HTTP with the Open Inference Protocol v2: a WSGI application, and a server to run it."""

from gdlib.serve.app import create_app
from gdlib.serve.server import serve

__all__ = ["create_app", "serve"]
