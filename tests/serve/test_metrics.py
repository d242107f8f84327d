"""Counts of what was served: exact after known requests, bounded whatever clients send, and the same from any process that is asked."""

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gdlib.serve import metrics as module
from gdlib.serve.metrics import BATCH_BUCKETS, LATENCY_BUCKETS, MAX_BATCH_SIZES, Metrics, Record, Stages, in_order, prometheus_text

STAGES = Stages(1000, 20_000, 300)


def parse(text: str) -> dict[str, dict[str, float]]:
    """The samples of Prometheus text, family -> sample -> value, checked for what the format demands."""
    families: dict[str, dict[str, float]] = {}
    kinds: dict[str, str] = {}
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            assert name not in families, "a family stands in one place"
            families[name] = {}
        elif line.startswith("# TYPE "):
            _, _, name, kinds[name] = line.split(" ")
        else:
            sample, value = line.rsplit(" ", 1)
            family = sample.split("{")[0]
            if family not in families:
                family = family.rsplit("_", 1)[0]
                assert kinds[family] == "histogram"
            assert family == name
            assert sample not in families[family], "a sample stands once"
            families[family][sample] = float(value)
    assert families.keys() == kinds.keys()
    for name, kind in kinds.items():
        if kind == "counter":
            assert name.endswith("_total")
        if kind == "histogram":
            check_histogram(name, families[name])
    return families


def check_histogram(name: str, samples: dict[str, float]) -> None:
    buckets: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for sample, value in samples.items():
        if sample.startswith(f"{name}_bucket"):
            labels, bound = sample.removeprefix(f"{name}_bucket").split(',le="')
            buckets[labels + "}"].append((float(bound.rstrip('"}')), value))
    for labels, pairs in buckets.items():
        bounds, counts = zip(*pairs, strict=True)
        assert list(bounds) == sorted(set(bounds))
        assert bounds[-1] == float("inf")
        assert list(counts) == sorted(counts), "buckets are cumulative"
        assert counts[-1] == samples[f"{name}_count{labels}"]
        assert f"{name}_sum{labels}" in samples
    assert len(samples) == sum(len(pairs) + 2 for pairs in buckets.values())


class TestRecord:
    def test_statistics(self) -> None:
        record = Record()
        record.succeed(3, STAGES)
        record.succeed(3, Stages(1, 2, 3))
        record.succeed(1, Stages(10, 20, 30))
        record.fail[:] = [2, 77]
        record.last = 5
        assert record.statistics("a", "1") == {
            "name": "a",
            "version": "1",
            "last_inference": 5,
            "inference_count": 7,
            "execution_count": 3,
            "inference_stats": {
                "success": {"count": 3, "ns": 21_366},
                "fail": {"count": 2, "ns": 77},
                "queue": {"count": 3, "ns": 0},
                "compute_input": {"count": 3, "ns": 1011},
                "compute_infer": {"count": 3, "ns": 20_022},
                "compute_output": {"count": 3, "ns": 333},
                "cache_hit": {"count": 0, "ns": 0},
                "cache_miss": {"count": 0, "ns": 0},
            },
            "batch_stats": [
                {
                    "batch_size": 1,
                    "compute_input": {"count": 1, "ns": 10},
                    "compute_infer": {"count": 1, "ns": 20},
                    "compute_output": {"count": 1, "ns": 30},
                },
                {
                    "batch_size": 3,
                    "compute_input": {"count": 2, "ns": 1001},
                    "compute_infer": {"count": 2, "ns": 20_002},
                    "compute_output": {"count": 2, "ns": 303},
                },
            ],
        }

    def test_batch_sizes_are_bounded_and_no_request_is_lost(self) -> None:
        record = Record()
        for rows in range(1, 5001):
            record.succeed(rows, STAGES)
        assert len(record.batches) <= MAX_BATCH_SIZES + 64
        assert sum(requests for requests, *_ in record.batches.values()) == 5000
        text = prometheus_text({("a", "1"): record}, {}, [], {})
        samples = parse(text)["gdlib_batch_rows"]
        for bound in BATCH_BUCKETS:
            assert samples[f'gdlib_batch_rows_bucket{{model="a",version="1",le="{bound}"}}'] == min(bound, 5000), (
                "rounding crosses no bound"
            )

    @pytest.mark.parametrize("bound", LATENCY_BUCKETS)
    def test_a_bound_counts_as_within(self, bound: float) -> None:
        record = Record()
        record.succeed(1, Stages(round(bound * 1e9), 0, 0))
        record.succeed(1, Stages(round(bound * 1e9), 0, 1))
        samples = parse(prometheus_text({("a", "1"): record}, {}, [], {}))["gdlib_inference_seconds"]
        assert samples[f'gdlib_inference_seconds_bucket{{model="a",version="1",le="{bound}"}}'] == 1


def test_prometheus_text() -> None:
    records = {("b", "10"): Record(), ("b", "9"): Record(), ("a", "1"): Record()}
    records["b", "10"].succeed(4, STAGES)
    records["b", "10"].succeed(5, Stages(10**11, 0, 0))
    records["a", "1"].fail[:] = [3, 10]
    gauges = [("in_flight", "Now.", 2.0)]
    text = prometheus_text(records, {404: 1, 200: 7}, gauges, {("a", "1"): True, ("b", "9"): False})
    families = parse(text)
    assert families["gdlib_responses_total"] == {'gdlib_responses_total{status="200"}': 7, 'gdlib_responses_total{status="404"}': 1}
    ten = '{model="b",version="10"}'
    assert families["gdlib_inference_success_total"][f"gdlib_inference_success_total{ten}"] == 2
    assert families["gdlib_inference_failure_total"]['gdlib_inference_failure_total{model="a",version="1"}'] == 3
    assert families["gdlib_inference_rows_total"][f"gdlib_inference_rows_total{ten}"] == 9
    assert families["gdlib_compute_infer_seconds_total"][f"gdlib_compute_infer_seconds_total{ten}"] == 2e-5
    assert families["gdlib_inference_seconds"][f"gdlib_inference_seconds_count{ten}"] == 2
    assert families["gdlib_inference_seconds"]['gdlib_inference_seconds_bucket{model="b",version="10",le="10.0"}'] == 1
    assert families["gdlib_batch_rows"][f"gdlib_batch_rows_sum{ten}"] == 9
    assert families["gdlib_in_flight"] == {"gdlib_in_flight": 2}
    assert families["gdlib_model_ready"] == {
        'gdlib_model_ready{model="a",version="1"}': 1,
        'gdlib_model_ready{model="b",version="9"}': 0,
    }
    versions = [sample.split('version="')[1][:-2] for sample in families["gdlib_inference_rows_total"]]
    assert versions == ["1", "9", "10"], "as numbers"


def test_prometheus_itself_reads_it() -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="checks the format with the package prometheus-client")
    record = Record()
    record.succeed(4, STAGES)
    text = prometheus_text({("a.b-c_d", "1"): record}, {200: 1}, [("in_flight", "Now.", 0)], {("a.b-c_d", "1"): True})
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["gdlib_inference_seconds"].type == "histogram"
    assert families["gdlib_responses"].type == "counter"
    assert sum(len(family.samples) for family in families.values()) == sum(map(len, parse(text).values()))


def test_order() -> None:
    keys = [("b", "2"), ("a", "10"), ("a", "9"), ("a", "0")]
    assert sorted(keys, key=in_order) == [("a", "0"), ("a", "9"), ("a", "10"), ("b", "2")]


class TestInFlight:
    def test_the_limit(self) -> None:
        metrics = Metrics()
        assert [metrics.enter(2) for _ in range(4)] == [True, True, False, False]
        assert metrics.in_flight == 2
        metrics.failed("a", "1", 0)
        assert metrics.enter(2)
        metrics.succeeded("a", "1", 1, STAGES)
        metrics.failed("a", "1", 0)
        assert metrics.in_flight == 0

    def test_threads_never_exceed_it(self) -> None:
        metrics = Metrics()
        inside, most = [0], [0]
        lock = threading.Lock()

        def go(_: int) -> bool:
            if not metrics.enter(3):
                return False
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            with lock:
                inside[0] -= 1
            metrics.failed("a", "1", 0)
            return True

        with ThreadPoolExecutor(8) as pool:
            assert any(pool.map(go, range(1000)))
        assert most[0] <= 3
        assert metrics.in_flight == 0


class TestOneProcess:
    def test_counts(self) -> None:
        metrics = Metrics()
        metrics.succeeded("a", "1", 3, STAGES)
        metrics.failed("a", "1", 50)
        metrics.failed("b", "2", 7)
        metrics.responded(200)
        metrics.responded(200)
        metrics.responded(404)
        records, responses = metrics.collect()
        assert responses == {200: 2, 404: 1}
        assert records["a", "1"].success == [1, 21_300]
        assert records["a", "1"].fail == [1, 50]
        assert records["b", "2"].fail == [1, 7]
        assert not metrics.shared

    def test_what_is_collected_is_a_copy(self) -> None:
        metrics = Metrics()
        metrics.succeeded("a", "1", 3, STAGES)
        records, responses = metrics.collect()
        metrics.succeeded("a", "1", 3, STAGES)
        metrics.responded(200)
        assert records["a", "1"].batches == {3: [1, 1000, 20_000, 300]}
        assert responses == {}

    def test_threads_lose_nothing(self) -> None:
        metrics = Metrics()

        def count(i: int) -> None:
            metrics.succeeded("a", "1", i % 5 + 1, STAGES)
            metrics.responded(200)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(count, range(1000)))
        records, responses = metrics.collect()
        assert (records["a", "1"].success[0], records["a", "1"].rows, responses) == (1000, 3000, {200: 1000})


class TestSeveralProcesses:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Metrics, Metrics]:
        one, other = Metrics(tmp_path), Metrics(tmp_path)
        one.succeeded("a", "1", 3, STAGES)
        one.failed("a", "1", 50)
        one.responded(200)
        other.succeeded("a", "1", 2, STAGES)
        other.succeeded("b", "1", 70_000, STAGES)
        other.responded(200)
        other.responded(500)
        return one, other

    def test_they_add_up(self, pair: tuple[Metrics, Metrics]) -> None:
        one, other = pair
        one.flush()
        other.flush()
        for metrics in pair:
            records, responses = metrics.collect()
            assert responses == {200: 2, 500: 1}
            assert records["a", "1"].success == [2, 42_600]
            assert records["a", "1"].rows == 5
            assert records["a", "1"].fail == [1, 50]
            assert records["a", "1"].batches == {3: [1, 1000, 20_000, 300], 2: [1, 1000, 20_000, 300]}
            assert sum(records["a", "1"].latency) == 2
            assert records["a", "1"].last > 0
            assert records["b", "1"].rows == 70_000

    def test_what_one_has_shown_the_other_shows(self, pair: tuple[Metrics, Metrics]) -> None:
        one, other = pair
        assert one.collect()[1] == {200: 1}
        assert other.collect()[1] == {200: 2, 500: 1}

    def test_those_of_a_process_that_has_ended_stay(self, pair: tuple[Metrics, Metrics], tmp_path: Path) -> None:
        for metrics in pair:
            metrics.flush()
        assert Metrics(tmp_path).collect()[1] == {200: 2, 500: 1}

    def test_a_process_that_ends_leaves_all_its_counts(self, tmp_path: Path) -> None:
        code = f"import pathlib; from gdlib.serve.metrics import Metrics; m = Metrics(pathlib.Path({str(tmp_path)!r})); m.responded(418)"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert Metrics(tmp_path).collect()[1] == {418: 1}

    def test_the_end_of_the_process_keeps_nothing_alive(self, tmp_path: Path) -> None:
        metrics = Metrics(tmp_path)
        alive = weakref.ref(metrics)
        del metrics
        gc.collect()
        assert alive() is None

    def test_a_child_counts_from_zero(self, pair: tuple[Metrics, Metrics], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one, _ = pair
        one.flush()
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            one.responded(201)
            one.flush()
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, "the parent's file is the parent's"
            one.forked()
            assert one.in_flight == 0
            one.responded(202)
            one.flush()
        assert Metrics(tmp_path).collect()[1] == {200: 1, 202: 1}

    def test_nothing_new_is_not_written_again(self, pair: tuple[Metrics, Metrics], tmp_path: Path) -> None:
        one, _ = pair
        one.flush()
        (path,) = tmp_path.iterdir()
        inode = path.stat().st_ino
        one.flush()
        assert path.stat().st_ino == inode
        one.responded(200)
        one.flush()
        assert json.loads(path.read_bytes())["responses"] == [[200, 2]]

    def test_a_full_disk_is_said_once_and_counts_go_on(self, pair: tuple[Metrics, Metrics], monkeypatch: Any, caplog: Any) -> None:
        one, other = pair
        other.flush()

        def full(path: Path, content: bytes) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(module, "write_atomically", full)
            for _ in range(3):
                assert one.collect()[1] == {200: 2, 500: 1}
        assert caplog.text.count("No space left") == 1
        one.flush()
        assert other.collect()[1] == {200: 2, 500: 1}

    def test_a_folder_that_is_gone(self, tmp_path: Path) -> None:
        metrics = Metrics(tmp_path / "gone")
        metrics.responded(200)
        assert metrics.collect() == ({}, {200: 1})

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[]",
            b"\xff",
            b"{}",
            b'{"responses": [[200]], "records": []}',
            b'{"responses": [[200, 1]], "records": [["a", "1", {}]]}',
            b'{"responses": [[200, 1]], "records": [["a", "1", {"success": [1], "fail": [0, 0], "stages": [0, 0, 0], "rows": 1, "last": 1, '
            b'"latency": [], "batches": []}]]}',
        ],
    )
    def test_a_file_that_cannot_be_read_is_left_out_whole(
        self, pair: tuple[Metrics, Metrics], tmp_path: Path, caplog: Any, content: bytes
    ) -> None:
        (tmp_path / "metrics-1-00.json").write_bytes(content)
        one, other = pair
        other.flush()
        records, responses = one.collect()
        assert responses == {200: 2, 500: 1}
        assert records["a", "1"].success[0] == 2
        assert "metrics-1-00.json cannot be read, and are left out" in caplog.text

    def test_files_of_ended_processes_become_one(self, tmp_path: Path) -> None:
        child = "import sys, pathlib; from gdlib.serve.metrics import Metrics; m = Metrics(pathlib.Path(sys.argv[1])); m.enter(1)"
        child += "; m.succeeded('a', '1', 3, (1, 2, 3)); m.responded(200)"
        for turn in range(3):
            subprocess.run([sys.executable, "-c", child, str(tmp_path)], check=True)
            if turn == 0:
                (file,) = tmp_path.glob("metrics-*.json")
                (tmp_path / "metrics-elsewhere-1-00.json").write_bytes(file.read_bytes())
        metrics = Metrics(tmp_path)
        assert sorted(path.name.split("-")[2] for path in tmp_path.glob("metrics-*.json")) == ["0", "1"], "another host's stays as it is"
        for _ in range(2):
            records, responses = metrics.collect()
            assert (records["a", "1"].success, records["a", "1"].rows, responses) == ([4, 24], 12, {200: 4})
            Metrics(tmp_path)
