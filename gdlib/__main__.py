"""`python -m gdlib`: the command line."""

from gdlib.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
