"""`python -m benchmarks.report`: every group of benchmarks beside its peers and this machine's limits, and the table of aims.

Prints, and writes docs/benchmarks.md with its pictures. With --quick it takes 1 round of each and writes nothing.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks import bench_calls as calls
from benchmarks import bench_footprint as footprint
from benchmarks import bench_gemm as gemm
from benchmarks import bench_gradient_descent as descent
from benchmarks import bench_kernels as kernels
from benchmarks import bench_networks as networks
from benchmarks import bench_reference as reference
from benchmarks import bench_scaling as scaling
from benchmarks import bench_sgd as sgd
from benchmarks import bench_threads as threads
from benchmarks import figures, machine
from benchmarks.measure import Group
from benchmarks.results import Results, run
from benchmarks.tables import aim_table, blas, group_table, machine_table, scaling_table, threads_table, topic_table

PINS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # kernels and cache sizes of another machine: NumPy at its best runs without them
COMMAND = "python -m benchmarks.report"
QUICK_ROUNDS = 1
TOPICS = (footprint, machine, reference, calls, descent, sgd, kernels, gemm, networks, threads, scaling)
GROUPS = [group for topic in TOPICS for group in topic.GROUPS]
INTRODUCTION = f"""# Benchmarks

Made by `{COMMAND}`, after `pip install .[bench]`; PyTorch and JAX take part where they are installed. The result
of each contender is checked before it is timed. Then all contenders of a table, and the machine's limit, take turns on the same arrays,
each after a rest, and an untimed run or 5 ms of them; the figures are medians, and ratios and shares are medians of those of each turn.
PyTorch runs with one thread and with all, and in several forms, NumPy too: the fastest counts. Absolute times are this machine's: compare
ratios. [limits.md](limits.md) says what keeps gdlib from the aims that it misses, and what was tried.
"""
ROOFLINE_NOTE = """A point of a roofline is a work of this page: its rate, and the flops that it does for each byte which it must read or
write at least. What fits a cache can stand above the slope, which is that of memory. Shuffled batches, which have no flops, have no point.
"""
CALLS_NOTE = """NumPy and PyTorch in their fastest forms: results in new arrays or in old ones; autograd, or gradients written out in
inference mode. Theirs are written over, gdlib's add up. The limit is a native call that does nothing.
"""
KERNELS_NOTE = f"""The kernels that no other part of this page has by themselves, on {kernels.ELEMENTS:,} elements (the average:
of {kernels.MODELS} vectors that are as many together), and layers of few outputs. Results are written in place or into arrays that are
there already; of PyTorch these are the operators that its modules and autograd call, which take a place for the result. The limit is the
bandwidth of memory, by reading alone or by reading as much as is written, a byte that is written counting as one that is read.
"""
GEMM_NOTE = """The gradients are those of weight and bias, added to what is there, and of the input. NumPy multiplies with OpenBLAS,
PyTorch with MKL, into arrays that are there already, as gdlib does; its predict makes a new one, and keeps packed weights between calls,
which no aim counts. The limit is the FMA peak; for a batch of one row, the bandwidth.
"""
NETWORKS_NOTE = f"""Linear layers with ReLU between, mean squared error, plain SGD, whole epochs over the same batches in order. Everyone
starts from equal parameters; those after the first epoch agree with float64 to {networks.TOLERANCE:g} of the way that they have gone.
PyTorch runs the usual loop over batches that are there already, SGD plain or fused; JAX an epoch in one jit(lax.scan). The limit is the
FMA peak of {machine.plural(machine.THREADS)}. The aims are those of the first {len(networks.AIMED)} networks.
"""
THREADS_NOTE = f"""PyTorch, in its faster number of threads, is beside gdlib with {machine.plural(machine.THREADS)}: descents and the
reference program by hand, networks by the usual loop, SGD plain or fused. The limit is the FMA peak, for the largest descent one
reading of X: its gain is what the machine itself gains by its threads. Computing counts as the cost of products and networks from
{threads.LEAST_COMPUTE_BOUND} inputs on; below, so is what cores tell each other.
"""
SCALING_NOTE = """The exponent is the slope of the straight line through the logarithms of cost and size: 1 is proportional, -1 for threads.
Few threads give few points, which a line meets exactly: no R^2. Sizes begin where the work is more than the call.
"""


def page(results: Results, products: str, load: float, picture: str) -> str:
    """`picture` is the Markdown that shows one, with a place for its name."""

    def each(groups: list[Group]) -> str:
        return "\n".join(group_table(group, results[group.title]) for group in groups)

    def part(title: str, *texts: str) -> str:
        return f"## {title}\n\n" + "\n".join(texts)

    def show(name: str, what: str) -> str:
        return picture.format(what=what, name=name) + "\n" if name in figures.available(results) else ""

    return "\n".join(
        [
            INTRODUCTION,
            aim_table(results),
            show("ratios", "gdlib beside its best peer, work by work"),
            part(
                "The machine and its limits",
                machine_table(results, products, load),
                ROOFLINE_NOTE,
                show("roofline-float32", "Roofline, float32"),
                show("roofline-float64", "Roofline, float64"),
            ),
            part("The reference program", show("reference", "Reference program"), each(reference.GROUPS)),
            part("Single calls", topic_table("Linear(10, 1)", calls.GROUPS, results), CALLS_NOTE),
            part("Gradient descent", show("gradient-descent", "Gradient descent"), each(descent.GROUPS)),
            part("Stochastic gradient descent", each(sgd.GROUPS)),
            part("Kernels one by one", topic_table("Kernel", kernels.GROUPS, results), KERNELS_NOTE),
            part("Matrix products", topic_table("batch x in -> out", gemm.GROUPS, results), GEMM_NOTE),
            part("Networks", topic_table("Training step", networks.GROUPS, results), NETWORKS_NOTE),
            part("Threads", threads_table(results), THREADS_NOTE),
            part("Cost against size", show("scaling", "Cost against size"), scaling_table(results), SCALING_NOTE),
            part("Footprint", each(footprint.GROUPS)),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Time gdlib beside its peers and this machine's limits.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} round of each group; write nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs", help="folder for the page and its pictures")
    options = parser.parse_args()
    if any(pin in os.environ for pin in PINS):  # read when NumPy is loaded, so that only a new process can be without them
        print(f"starting again without {' and '.join(PINS)}", flush=True)
        os.execve(sys.executable, sys.orig_argv, {name: value for name, value in os.environ.items() if name not in PINS})
    options.output.mkdir(parents=True, exist_ok=True)
    begin, products, load = time.perf_counter(), blas(), os.getloadavg()[0]
    results = run(GROUPS, lambda group: QUICK_ROUNDS if options.quick else group.rounds)
    text = page(results, products, load, "![{what}](benchmarks-{name}.svg)")
    print(text)
    if not options.quick:
        (options.output / "benchmarks.md").write_text(text)
        figures.draw(results, options.output)
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
