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
TOPICS = (footprint, machine, reference, calls, descent, sgd, gemm, networks, threads, scaling)
GROUPS = [group for topic in TOPICS for group in topic.GROUPS]
INTRODUCTION = f"""# Benchmarks

Made by `{COMMAND}`, after `pip install .[bench]`; PyTorch and JAX take part where they are installed. The result
of each contender is checked before it is timed. Then all contenders of a table, and the machine's limit, take turns on the same arrays;
the figures are medians, and ratios and shares are medians of those of each turn. PyTorch runs with one thread and with all, and in several
forms, NumPy too: the fastest counts. Absolute times are this machine's: compare ratios.
"""
ROOFLINE_NOTE = """A point of a roofline is a work of this page: its rate, and the flops that it does for each byte which it must read or
write at least. What fits a cache can stand above the slope, which is that of memory.
"""
CALLS_NOTE = """NumPy and PyTorch in their fastest forms: results in new arrays or in old ones; autograd, or gradients written out in
inference mode. Theirs are written over, gdlib's add up. The limit is a native call that does nothing.
"""
GEMM_NOTE = """The gradients are those of weight and bias, added to what is there, and of the input. NumPy multiplies with OpenBLAS,
PyTorch with MKL, into arrays that are there already. The limit is the FMA peak; for a batch of one row, reading as many bytes.
"""
NETWORKS_NOTE = f"""Linear layers with ReLU between, mean squared error, plain SGD, whole epochs over the same batches in order. Everyone
starts from equal parameters; those after the first epoch agree with float64 to {networks.TOLERANCE:g} of the way that they have gone.
PyTorch runs the usual loop over batches that are there already, SGD plain or fused; JAX an epoch in one jit(lax.scan). The limit is the
FMA peak of {machine.plural(machine.THREADS)}.
"""
THREADS_NOTE = """The limit is the FMA peak, for the largest descent the read bandwidth: what the machine itself gains by its threads.
"""
LIMITS_NOTE = """What keeps the rows marked "no" from their aims, and what was tried. The figures come from runs of the single works: on a
Zen 4 (AVX-512; 24 GB/s and 115 GFLOP/s for one core) unless the Zen 3 is named (AVX2; 12 to 17 GB/s and 98 GFLOP/s). Both are shared: for
minutes at a time everything is 1.3 to 1.6 times as slow, which single calls and the straight lines of costs meet too.

- Gradient descent, 1,000 features, beside NumPy and PyTorch: one pass at the full bandwidth would be 2.65 times as fast as NumPy's two, and
  4.4 times as fast as PyTorch's, so that 3 and 5 times cannot be had. A core can wait for some 24 lines that its own instructions asked
  for, which is 16 GB/s; the prefetcher of its L2, which follows reading in order, keeps more on their way (28 GB/s). So rows up to 8 KiB
  are read in order and once: those that the registers hold for both uses at once (one core, 100 features: 28 GB/s, before 21; float64 27,
  before 17; with AVX-512, rows of 4 to 16 vectors without asking for lines ahead, which cost them 5 to 25 %), longer ones by the dot
  product of each together with the gradient of the one before, lines 16 KiB ahead being asked for (1,000 features: 24 to 26 GB/s, before
  21; float64 22 to 25, before 21). Tried for these: two and four rows at a time (23, 21), lines 2, 4 and 8 KiB ahead (15, 18, 20), none
  (19; float64 14), every second and fourth (15, 18), into L1 (11); rows in blocks, twice (21).
- 2048^3: one core alone reaches 93 to 95 % of the FMA peak forward and 92 to 93 % in the gradients (before 90 and 87 %), two 85 to 96 %.
  What it took: the sums of a tile went over the stack at its begin and end, 300 cycles each time (loops that were not unrolled); tiles of C
  are asked for ahead, to be written (3 %); panels of B fill three fourths of L2 and not half (1 %); groups of copied strips meet 3 MiB of B
  (2 %), 8 steps of depth are copied at a time (2 %). Tried without gain: rows of A asked for ahead, wholly or their first 1 to 32 lines;
  copies asked for ahead; blocks of depth of 2, 5.6 and 8 KiB; groups of 4, 16 and 32 tiles; 0.7, 1, 4 and 8 MiB of B.
- Networks: from 784-512-10 up gdlib is at the FMA peak to some percent, which leaves 1.08 to 1.47 beside JAX. In 1024-1024-1024-1024 tiles
  take 92 % of the time, layouts 3.5 %, updates and activations 2 %; in 784-512-10 tiles take 89 % of one thread's time, at 98 % of its
  peak. What `fit` does once, a copy of the parameters and a look at what the last update left, took 3.6 % of these 64 steps and takes about
  2 %. In 13-64-64-1 each thread takes its rows through all layers; what one core wrote and the other reads costs much of what two threads
  gain. Batches from 128 rows on are cut into pieces with gradients of their own, so that only these change cores: two threads gain 1.8 in
  batches of 256 (before 1.45), 42 us for 52. In batches of 32 each thread then takes its outputs of every weight gradient, and they gain
  1.0 to 1.2; pieces of 16 rows (11.2 us for 9.6), and what the other core wrote, or is to be written, asked for ahead (no gain) were tried.
  One thread takes 10.5 us for 32 rows (before 11.1) and 75.4 us for 256 (before 77), 76 and 84 % of the peak: a tile of 64 steps reaches 96
  % of it and more; layouts, activations and updates are the rest. Loading halves of rows in place of shuffles in the layouts cost 1 to 3 %
  elsewhere, and tiles without divisions gained nothing.
- Cost against features: an exponent of 0.89 in the table. What a row costs beyond its bytes, 2 to 4 ns, shows in short ones. Since that
  report rows of 64 to 256 features are read without asking for lines ahead: one core takes 10.2 to 12 ns for 64 (before 11.2 to 12.7), 16
  to 17.6 for 100 (19.4 to 21.4), 41 for 256 (51 to 54), alternating; a call of `fit` and a new model, 0.15 ms, are 4 % of an epoch of 64
  features. Tried: lines 4 and 32 KiB ahead (as 16 KiB, or slower), 24 and 32 vectors of a row in registers (up to 30 % slower than in
  turns); sums over lanes that are made for several rows together, which pays for 16 rows of one vector (10 features from memory 2.3 ns a
  row for 3.7, from L2 1.05 to 1.2 times as fast), not for 8 of two (0.85 to 1.17) or fewer of more (0.6 to 1.1).
- Shuffled epochs: 1.3 to 2.6 times as fast as before where two threads share a batch, 1.1 to 1.9 times on one. Rows and their targets are
  asked for along with the arithmetic, a block of rows or 64 rows before; a batch is cut into pieces of 32 KiB and more (256 x 100, one
  thread: 45 ns a row, 41 with its targets asked for; two threads 28 to 34). A core waits for 24 lines, 7 or 8 a row, at about 120 ns: 40
  ns. Tried: row and gradient at one visit with requests (59 ns for 49), pieces of 25 KiB (10 % slower), the pieces' first lines in order
  asked for (4 to 13 % slower).
- What other users of the machine cost: the same works alone, minutes apart, take 1 to 1.5 times as long, two threads gain 1.4 to 2 (the
  least of a report was 1.70 to 1.87, each time another work), NumPy's loop of the reference program was 1.84 to 2.8 times gdlib's, one row
  took 0.275 to 0.54 us (before 0.34 to 0.62), and networks were 1.41 to 1.57 times as fast as their best peer. At times both CPUs of the
  machine are one core of its host: two threads that share nothing, each with a CPU of its own and no time stolen, then do as much together
  as one alone (10 of 600 measurements of 20 ms, one to four in a row). After NumPy's products its threads spin for 0.1 s, and what shares
  work meanwhile is half as fast: contenders rest for longer.
- One machine is not another. The table is of a Zen 4, and of the code before rows of several lines were left to the prefetcher and up to
  eight rows transposed weights in registers. Of an earlier report there, networks were 1.57x and the least 1.08x, 2048^3 at 85 % of the
  peak, the least gain of two threads 1.70x and the descents of 1,000 features 4.00x PyTorch: these rows differ so from hour to hour. On a
  Zen 5 with 43 GB/s and 270 GFLOP/s for one core, long before, the code was 13.9x scikit-learn in SGD epochs, 1.54x in networks, 1.28x in
  products and 1.61x NumPy in descents. The last report on a Zen 3, in a slow hour: the reference program as below, 7.22 us for a step of
  its readable loop, 0.86 us for one row; descents at 76 % of the read bandwidth, 2.08x NumPy and 3.39x PyTorch; products 1.21x, the least
  0.89x, 66 % of the peak at 2048^3; networks 1.43x, the least 1.01x; two threads 1.64x.
- Few rows with AVX-512 (Zen 4; since the report): up to eight, and not four, transpose weights in registers, 1.2 to 2.1 times as fast as by
  copied weights (8 x 2000 -> 2000 720 us for 1,140), and two threads share them by vectors of outputs (5 x 2972 -> 21 7 us for 14.5). One
  row through weights from L3 is 1.13 times as fast on one core, but 0.7 to 0.9 of NumPy's matrix-vector product, which sums along the rows:
  a block of 16 x 16 takes 64 cycles of shuffles here, and as many in its chain of additions. Tried: two vectors in turns, and quarters of
  lines that are loaded into their lanes (32 shuffles and 64 loads): as fast. Products by whole rows are worth as much here as on the Zen 3:
  few rows 1.2 to 1.3 times as fast in the geometric mean, few steps 1.06 to 1.12, a small B 1.00 to 1.02.
- The Zen 3: five reports gave 1,606, 2,836, 3,579, 3,588 and 3,655x PyTorch, 6.55, 10.0, 13.7, 12.8 and 12.6x scikit-learn and 3.53, 5.42,
  7.51, 7.51 and 7.21x JAX in the reference program, 7.6, 10.5, 9.80, 11.2 and 11.2x scikit-learn in SGD epochs in order, 1.13, 1.20, 1.19,
  1.15 and 1.21x in products, 1.45, 1.44, 1.35, 1.51 and 1.43x in networks; the last three are of nearly the same code for networks, in
  other hours (784-512-512-10 took 3.4 ms for a step in one and 5.1 in another, 3.1 to 5.0 from minute to minute alone). Gradients of one
  row write 64 MiB of float32 and twice that of float64, 0.89 to 1.1x PyTorch. Its Python is slower: a call that takes
  0.75 us took 0.49 on the Zen 4, as NumPy's 4.5 us took 2.9. Bringing the rows into the form of the registers once makes an epoch of the
  reference program 47.6 us for 59 to 84 (in order 30.0 for 35.3); rows under a line are not asked for ahead (0.8 times the time), and
  batches under two vectors' lanes read rows where they are (1.2 times as fast in order). Tried: rows read again for their second use (10
  to 15 % faster where they are extended, 5 to 16 % slower in place), four chains of additions, fewer shuffles for a sum, requests into L1
  (nothing).
- Descents on the Zen 3: its core reads one sequence at 15 GB/s, two at 19 and four at 21, two cores 22 to 25 in all; tasks in turns make
  descents from memory 1.1 to 1.3 times as fast (1,000 features 1.87 to 2.2x NumPy and 3.0 to 3.5x PyTorch; 100 in float64 3.2 to 3.9x and
  4.9 to 6.9x). NumPy's two passes over 1,000 features take 2.2 to 2.4 times as long as reading X once does.
- Products on the Zen 3: a step of a tile takes 6 cycles of arithmetic, and with AVX-512 24, which hide more. Columns from beyond L2, which
  the gradients of large batches are made of, are laid out anew (20,000 x 500 -> 30 1.34 to 1.44 times as fast, 8,000 x 784 -> 700 1.5 to
  1.8, 512 x 784 -> 500 in float64 1.07 to 1.17). Eight strips of rows take turns at a panel (1.02 to 1.06 times as fast from 128 rows on;
  4 and 16 as much, 2 half), and 1,024 rows and more meet blocks of B of 1.5 MiB (1.00 to 1.12 again; 3 MiB 0.97 to 1.08, 0.75 and 1 0.99
  to 1.09, and for 512 rows 0.98 to 1.01): rows that lie and such blocks are 1.02 to 1.12 times as fast at 2048^3 as rows laid out anew.
  One core alone reached 85 to 87 % of the FMA peak at 2048^3 and two together up to 85 % in quiet minutes, 75 and 70 to 78 % in others,
  while the peak itself stays the same: its neighbours take L3 and memory. Tried without gain: panels that stay in L1 for 16 and 64 strips
  in turn (blocks of depth of 1 KiB 0.76 to 0.94, of 512 bytes 0.55 to 0.70 of the rate), whole depths of 8 KiB, 288 and 448 KiB of L2,
  tiles of 6 x 2 vectors for 4 x 3, rows of A or panels of B asked for ahead, blocks of depth of 1 and 2 KiB (up to 18 % slower), L2 filled
  by half. Products of up to 12 rows, or of up to 64 steps with a B in a fourth of L2, are computed by whole rows, four at a time:
  gradients of 40 random shapes 1.2 times as fast in the geometric mean, 0.8 to 2.1 each; of small batches, of 4 to 12 outputs and of small
  layers up to 2.3 times (1 x 784 -> 64 1.6, 128 x 784 -> 10 1.5, input gradients of 4 x 1000 -> 1000 1.5 to 1.9). A B whose rows are a
  multiple of a page apart is read in 8 steps at a time then, one from beyond L2 in 16 (64 took up to twice as long). Tried without gain: a
  vector of each row at a time (0.7 to 1.2), 16 and 24 rows (0.6 to 1.4). Weight gradients of up to 3 outputs read rows once for all of
  them, four at a time: 1.0 to 2.3 times as fast (455 x 2043 -> 2 in float64 1.6); the same way for the fused step gave 0.86 to 1.06.
- One row on the Zen 3, by two vectors in turns, reaches 0.87 to 0.98 of NumPy in 1499 -> 419, in float64 too (before 0.63 to 0.76); 4096 x
  4096 gives 0.91 to 1.04, and 1024 x 1024, whose rows fall on one set of L1, 0.66 to 0.79 in float32. Tried without gain: two or four
  neighbouring rows in turns (0.6 to 1.2), four tasks in turns in a loop alone, turns that go on from block to block (5 % slower); by
  columns copied into L1 first (0.5 to 0.9), or by two vectors 0.25 to 2 KiB apart in rows that are a multiple of 4 KiB (0.75 to 1.35, 0.8
  from memory).
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
            part("Limits", LIMITS_NOTE),
            part("The reference program", show("reference", "Reference program"), each(reference.GROUPS)),
            part("Single calls", topic_table("Linear(10, 1)", calls.GROUPS, results), CALLS_NOTE),
            part("Gradient descent", show("gradient-descent", "Gradient descent"), each(descent.GROUPS)),
            part("Stochastic gradient descent", each(sgd.GROUPS)),
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
