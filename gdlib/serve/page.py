"""The page for people at /: static files, read once, with headers that let nothing in from elsewhere.

The page is a client of the protocol like any other: what it shows it asks for with the same requests, under the same keys. Its URLs are
relative, so that it works wherever the application is mounted.
"""

from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import PurePosixPath
from urllib.parse import quote

from gdlib.serve.exchange import Answer, Exchange

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = (  # nosniff is on every answer
    ("Content-Security-Policy", _POLICY),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-cache"),  # a new version of the package brings a new page
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_INDEX = "index.html"


def handlers() -> dict[str, Callable[[Exchange], Answer]]:
    """The page's handlers by path."""
    answers = {}
    for file in (resources.files("gdlib.serve") / "static").iterdir():
        content_type = _TYPES.get(PurePosixPath(file.name).suffix)
        if content_type is not None:  # not what an editor has left there
            answers[file.name] = Answer(file.read_bytes(), 200, content_type, HEADERS)
    found: dict[str, Callable[[Exchange], Answer]] = {
        f"/static/{name}": partial(_give, answer) for name, answer in answers.items() if name != _INDEX
    }
    return found | {"/": partial(_give, answers[_INDEX]), "": partial(_give_or_move, answers[_INDEX])}


def _give(answer: Answer, exchange: Exchange) -> Answer:
    return answer


def _give_or_move(answer: Answer, exchange: Exchange) -> Answer:
    """The page, or where it is: relative URLs need the slash after a mount point."""
    mount = exchange.environ.get("SCRIPT_NAME", "").rpartition("/")[2]
    if not mount:
        return answer
    return Answer(b"", 308, "text/plain; charset=utf-8", (("Location", f"{quote(mount, encoding='latin-1')}/"),))
