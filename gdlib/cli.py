"""The command line: gdlib quickstart | serve | info."""

import argparse
import sys
from collections.abc import Sequence
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

    serve(arguments.models, host=arguments.host, port=arguments.port, ready=ready)


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
    command.add_argument("models", help="folder with <name>/<version>/model.safetensors")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    command.set_defaults(run=_serve)
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
