"""Training by parameter averaging (local SGD): workers learn from shards of the rows, and their parameters are averaged between rounds."""

from gdlib.distributed.shared_memory import fit

__all__ = ["fit"]
