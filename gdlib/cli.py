"""The command line: gdlib quickstart | serve | keys | info."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gdlib.serve.server import Server


def _quickstart(arguments: argparse.Namespace) -> None:
    from gdlib.quickstart import quickstart

    quickstart(arguments.models)


def _serve(arguments: argparse.Namespace) -> None:
    from gdlib.serve import serve

    def ready(server: "Server") -> None:
        print(f"serving {arguments.models} at {server.url} (Ctrl-C ends it)", flush=True)

    serve(
        arguments.models,
        host=arguments.host,
        port=arguments.port,
        threads=arguments.threads,
        keys=arguments.keys,
        admin=arguments.admin,
        allowed_hosts=arguments.allowed_host,
        access_log=arguments.access_log,
        batch_window=arguments.batch_window,
        grace=arguments.grace,
        ready=ready,
    )


def _keys_add(arguments: argparse.Namespace) -> None:
    from gdlib.serve.keys import ALL_MODELS, add_key

    secret = add_key(arguments.file, arguments.name, arguments.scope or [ALL_MODELS])
    print(secret)
    print("Clients send it as 'Authorization: Bearer <key>'. It is shown this once.", file=sys.stderr)


def _keys_list(arguments: argparse.Namespace) -> None:
    from gdlib.serve.keys import read_keys

    for key in read_keys(arguments.file):
        print(f"{key.name}  {key.created}  {' '.join(sorted(key.scopes))}")


def _keys_revoke(arguments: argparse.Namespace) -> None:
    from gdlib.serve.keys import revoke_key

    revoke_key(arguments.file, arguments.name)


def _info(arguments: argparse.Namespace) -> None:
    import gdlib

    print(f"gdlib    {gdlib.__version__}")
    gdlib.show_config()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gdlib", description="Train and serve linear models on a CPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("quickstart", help="train on the diabetes study, save, serve, and ask for one patient")
    command.add_argument("--models", default="models", help="folder for the model (default: models)")
    command.set_defaults(run=_quickstart)
    command = commands.add_parser("serve", help="serve a folder of models over the Open Inference Protocol")
    command.add_argument("models", help="folder with <name>/<version>/model.safetensors or model.onnx")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    command.add_argument("--threads", type=int, default=4, help="requests that are answered at once (default: 4)")
    command.add_argument("--keys", metavar="FILE", help="file of `gdlib keys`; needed for an address that others can reach")
    command.add_argument("--admin", action="store_true", help="let keys with the scope admin load and unload models")
    command.add_argument("--allowed-host", action="append", default=[], metavar="NAME", help="a name that clients call this server by")
    command.add_argument("--access-log", metavar="FILE", help="append a JSON line for every request; - is standard output")
    window = "seconds that requests to a wide model wait for each other, to be computed together; 0.0005 is a good start (default: 0)"
    command.add_argument("--batch-window", type=float, default=0.0, metavar="SECONDS", help=window)
    command.add_argument("--grace", type=float, default=1.0, help="seconds from a signal to closing the port (default: 1)")
    command.set_defaults(run=_serve)
    keys = commands.add_parser("keys", help="make, list and revoke access keys").add_subparsers(dest="action", required=True)
    command = keys.add_parser("add", help="make a key and print it")
    command.add_argument("name", help="what it is called in the list and in the access log")
    scope = "models:NAME, models:*, metrics or admin; may be repeated (default: models:*)"
    command.add_argument("--scope", action="append", help=scope)
    command.set_defaults(run=_keys_add)
    command = keys.add_parser("list", help="names, days and scopes of the keys")
    command.set_defaults(run=_keys_list)
    command = keys.add_parser("revoke", help="take a key out of force; a running server notices by itself")
    command.add_argument("name")
    command.set_defaults(run=_keys_revoke)
    for command in keys.choices.values():
        command.add_argument("--file", type=Path, default=Path("keys.json"), help="the file of keys (default: keys.json)")
    command = commands.add_parser("info", help="print which kernels run here, and why")
    command.set_defaults(run=_info)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; an error that a user can mend is one line on standard error and exit status 1."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        print(f"gdlib: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
