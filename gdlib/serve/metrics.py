"""What was served, by model: counts, times and batch sizes, as the protocol's statistics and as Prometheus text.

Of several processes each keeps its own counts and writes them to a file in a shared folder now and then; whoever is asked adds all the
files up, those of processes that have ended too, so that counters never fall. Prometheus's own client library would take 14 MB of memory
and 75 ms of the start, a third of what the whole server has.
"""

import atexit
import logging
import os
import re
import secrets
import socket
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from gdlib.serialization import write_atomically
from gdlib.serve.locks import locked

logger = logging.getLogger(__name__)

LATENCY_BUCKETS = (50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
BATCH_BUCKETS = tuple(4**power for power in range(9))  # rows of a request, up to 65,536
MAX_BATCH_SIZES = 64  # that are told apart by model and version: a client chooses them freely
_HOST = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32] or "host"
_ENDED = "0"  # in place of a process's number: the sum of ended ones
_BOUNDS_NS = tuple(round(bound * 1e9) for bound in LATENCY_BUCKETS)


class Stages(NamedTuple):
    """Nanoseconds that a request took: to read its tensors, to compute, to write its answer."""

    compute_input: int
    compute_infer: int
    compute_output: int


class Record:
    """The counts of one version of a model. All but `last` add up."""

    def __init__(self) -> None:
        self.fail = [0, 0]  # requests, nanoseconds
        self.rows = 0
        self.last = 0  # of the last inference, milliseconds since 1970
        self.latency = [0] * (len(_BOUNDS_NS) + 1)  # requests in each bucket, the last without a bound
        self.batches: dict[int, list[int]] = {}  # rows -> requests, nanoseconds of the stages

    @property
    def stages(self) -> list[int]:
        """Nanoseconds of all requests that were answered, by stage."""
        return [sum(counts[1 + i] for counts in self.batches.values()) for i in range(len(Stages._fields))]

    @property
    def success(self) -> list[int]:
        """Requests that were answered, and their nanoseconds."""
        return [sum(counts[0] for counts in self.batches.values()), sum(self.stages)]

    def succeed(self, rows: int, stages: tuple[int, int, int]) -> None:
        """Count an answer to a request of `rows` rows, and the nanoseconds of its `Stages`."""
        read, computed, written = stages
        self.rows += rows
        self.last = int(time.time() * 1000)
        self.latency[bisect_left(_BOUNDS_NS, read + computed + written)] += 1
        batch = self.batches.get(rows)
        if batch is None:
            while len(self.batches) >= MAX_BATCH_SIZES and rows not in self.batches and rows & (rows - 1):
                rows = 1 << rows.bit_length()  # the next power of two
            batch = self.batches.setdefault(rows, [0, 0, 0, 0])
        batch[0] += 1
        batch[1] += read
        batch[2] += computed
        batch[3] += written

    def add(self, other: "Record") -> None:
        """Add the counts of another process."""
        for mine, theirs in (
            (self.fail, other.fail),
            (self.latency, other.latency),
        ):
            mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]
        self.rows += other.rows
        self.last = max(self.last, other.last)
        for rows, counts in other.batches.items():
            self.batches[rows] = [a + b for a, b in zip(self.batches.get(rows, [0] * 4), counts, strict=True)]

    def statistics(self, model: str, version: str) -> dict[str, Any]:
        """As the statistics extension has it."""
        names = Stages._fields
        count = self.success[0]
        durations = {"success": self.success, "fail": self.fail, "queue": [count, 0]}
        durations |= {name: [count, nanoseconds] for name, nanoseconds in zip(names, self.stages, strict=True)}
        durations |= {"cache_hit": [0, 0], "cache_miss": [0, 0]}
        batches = [
            {"batch_size": rows} | {name: _duration(requests, time) for name, time in zip(names, times, strict=True)}
            for rows, (requests, *times) in sorted(self.batches.items())
        ]
        return {
            "name": model,
            "version": version,
            "last_inference": self.last,
            "inference_count": self.rows,
            "execution_count": count,
            "inference_stats": {name: _duration(*duration) for name, duration in durations.items()},
            "batch_stats": batches,
        }


Records = dict[tuple[str, str], Record]  # (model, version) -> counts


class Metrics:
    """The counts of this process and, with a shared folder, of all processes."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._records: Records = {}
        self._responses: dict[int, int] = {}  # status -> requests of any kind
        self.in_flight = 0  # inference requests being answered
        self._name = _fresh_name()
        self._process = os.getpid()
        self._flushed = b""
        self._flushing = threading.Lock()
        self._failed = False
        if folder is not None:
            atexit.register(_flush_at_exit, weakref.ref(self))
            _fold(folder)

    @property
    def shared(self) -> bool:
        """Whether the counts of all processes are seen."""
        return self._folder is not None

    def enter(self, limit: int) -> bool:
        """Count an inference request as in flight, unless `limit` are already."""
        with self._lock:
            if self.in_flight >= limit:
                return False
            self.in_flight += 1
            return True

    def succeeded(self, model: str, version: str, rows: int, stages: tuple[int, int, int]) -> None:
        """Count a request that had entered as answered."""
        with self._lock:
            self.in_flight -= 1
            self._record(model, version).succeed(rows, stages)

    def failed(self, model: str, version: str, nanoseconds: int) -> None:
        """Count a request that had entered as refused or failed."""
        with self._lock:
            self.in_flight -= 1
            fail = self._record(model, version).fail
            fail[0] += 1
            fail[1] += nanoseconds

    def responded(self, status: int) -> None:
        """Count an answer of any kind."""
        with self._lock:
            self._responses[status] = self._responses.get(status, 0) + 1

    def forked(self) -> None:
        """Start from zero in a child process: what the parent has counted is the parent's."""
        self._lock, self._flushing = threading.Lock(), threading.Lock()  # the parent's may have been held by a thread that is not here
        self._records, self._responses, self.in_flight = {}, {}, 0
        self._name, self._process, self._flushed = _fresh_name(), os.getpid(), b""
        if self._folder is not None:
            _fold(self._folder)

    def flush(self) -> None:
        """Write this process's counts, if they have changed, where the others read them. A disk that is full is reported once."""
        if self._folder is None or self._process != os.getpid():  # forked, and still with the counts of the parent
            return
        with self._flushing:  # or older counts could come last
            with self._lock:
                text = _to_text(self._records, self._responses)
            if text == self._flushed:
                return
            try:
                write_atomically(self._folder / self._name, text)
            except OSError as error:
                if not self._failed:
                    logger.error("The counts cannot be written for the other processes: %s", error)
                self._failed = True
            else:
                self._failed, self._flushed = False, text

    def collect(self) -> tuple[Records, dict[int, int]]:
        """(counts by model and version, answers by status) of all processes."""
        self.flush()  # what is shown once is seen by whoever is asked next
        with self._lock:
            records, responses = {key: _copy(record) for key, record in self._records.items()}, dict(self._responses)
        if self._folder is not None:
            # Without the lock files could be folded into one meanwhile, and counted twice.
            with suppress(FileNotFoundError), locked(self._folder):  # flush has said that the folder is gone
                for path in self._folder.glob("metrics-*.json"):
                    if path.name != self._name:
                        _add_file(path, records, responses)
        return records, responses

    def _record(self, model: str, version: str) -> Record:
        key = (model, version)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = Record()
        return record


def prometheus_text(
    records: Records, responses: dict[int, int], gauges: Iterable[tuple[str, str, float]], ready: dict[tuple[str, str], bool]
) -> str:
    """The text that Prometheus scrapes. `gauges` are (name, help, value); `ready` says which versions serve.

    Source: Prometheus, "Text-based exposition format" 0.0.4.
    """
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
        lines.extend((f"# HELP gdlib_{name} {text}", f"# TYPE gdlib_{name} {kind}"))
        lines.extend(f"gdlib_{name}{labels} {value}" for labels, value in samples)

    def each(value: Callable[[Record], float]) -> Iterator[tuple[str, float]]:
        return ((f"{{{_labels(key)}}}", value(record)) for key, record in sorted(records.items(), key=_order))

    family(
        "responses_total", "counter", "Answers to requests of any kind.", ((f'{{status="{s}"}}', n) for s, n in sorted(responses.items()))
    )
    family("inference_success_total", "counter", "Inference requests answered.", each(lambda record: record.success[0]))
    family(
        "inference_failure_total", "counter", "Inference requests to a loaded model that were refused or failed.", each(lambda r: r.fail[0])
    )
    family("inference_rows_total", "counter", "Rows predicted.", each(lambda record: record.rows))
    for i, stage in enumerate(Stages._fields):
        family(f"{stage}_seconds_total", "counter", f"Time in the stage {stage}.", each(lambda record, i=i: record.stages[i] / 1e9))  # type: ignore[misc]
    family("inference_seconds", "histogram", "Time from the body to the answer.", _histogram(records, LATENCY_BUCKETS, _latency))
    family("batch_rows", "histogram", "Rows of a request.", _histogram(records, BATCH_BUCKETS, _batches))
    family("model_ready", "gauge", "1 where the version serves.", ((f"{{{_labels(key)}}}", int(value)) for key, value in ready.items()))
    for name, text, number in gauges:
        family(name, "gauge", text, [("", number)])
    return "\n".join(lines) + "\n"


def in_order(key: tuple[str, str]) -> tuple[str, int]:
    """What sorts (model, version) by name, then by number."""
    return key[0], int(key[1])


def _order(item: tuple[tuple[str, str], Record]) -> tuple[str, int]:
    return in_order(item[0])


def _fresh_name(process: int | None = None) -> str:
    # Process numbers come again, and mean nothing on another host.
    return f"metrics-{_HOST}-{os.getpid() if process is None else process}-{secrets.token_hex(4)}.json"


def _has_ended(path: Path) -> bool:
    process = path.name.split("-")[2]
    if process == _ENDED:
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        pass
    return False


def _fold(folder: Path) -> None:
    """Make one file of those of ended processes: a server that renews its workers would fill the folder."""
    try:
        with locked(folder):
            records: Records = {}
            responses: dict[int, int] = {}
            ended = [path for path in folder.glob(f"metrics-{_HOST}-*-*.json") if _has_ended(path)]
            folded = [path for path in ended if _add_file(path, records, responses)]
            if len(folded) > 1:
                write_atomically(folder / _fresh_name(int(_ENDED)), _to_text(records, responses))
                for path in folded:
                    path.unlink()
    except OSError as error:
        logger.warning("The counts of ended processes stay in files of their own: %s", error)


def _labels(key: tuple[str, str]) -> str:
    return 'model="{}",version="{}"'.format(*key)  # names of letters, digits and ._- need no escapes


def _latency(record: Record) -> tuple[list[int], float]:
    return record.latency, record.success[1] / 1e9


def _batches(record: Record) -> tuple[list[int], float]:
    counts = [0] * (len(BATCH_BUCKETS) + 1)
    for rows, (requests, *_) in record.batches.items():
        counts[bisect_left(BATCH_BUCKETS, rows)] += requests
    return counts, record.rows


def _histogram(
    records: Records, bounds: tuple[float, ...], counted: Callable[[Record], tuple[list[int], float]]
) -> Iterator[tuple[str, float]]:
    for key, record in sorted(records.items(), key=_order):
        counts, total = counted(record)
        for bound, running in zip((*map(str, bounds), "+Inf"), accumulate(counts), strict=True):
            yield f'_bucket{{{_labels(key)},le="{bound}"}}', running
        yield f"_sum{{{_labels(key)}}}", total
        yield f"_count{{{_labels(key)}}}", sum(counts)


def _duration(count: int, nanoseconds: int) -> dict[str, int]:
    return {"count": count, "ns": nanoseconds}


def _flush_at_exit(metrics: "weakref.ref[Metrics]") -> None:
    alive = metrics()
    if alive is not None:
        alive.flush()


def _to_text(records: Records, responses: dict[int, int]) -> bytes:
    kept = [(*key, vars(record) | {"batches": list(record.batches.items())}) for key, record in records.items()]
    return orjson.dumps({"responses": list(responses.items()), "records": kept})


def _add_file(path: Path, records: Records, responses: dict[int, int]) -> bool:
    """Add the counts in a file, all or none; whether they could be read."""
    try:
        content = orjson.loads(path.read_bytes())
        theirs = {(model, version): _restore(fields) for model, version, fields in content["records"]}
        statuses = dict(content["responses"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("The counts in %s cannot be read, and are left out: %s", path, error)
        return False
    for status, count in statuses.items():
        responses[status] = responses.get(status, 0) + count
    for key, record in theirs.items():
        records.setdefault(key, Record()).add(record)
    return True


def _restore(fields: dict[str, Any]) -> Record:
    whole = Record()
    record = Record()
    vars(record).update({name: fields[name] for name in vars(whole)} | {"batches": dict(fields["batches"])})
    whole.add(record)  # raises where a count is missing
    return whole


def _copy(record: Record) -> Record:
    copy = Record()
    copy.add(record)
    return copy
