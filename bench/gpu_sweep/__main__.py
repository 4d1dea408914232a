"""Measures all that a GPU has to show, in one command for one that is at hand for minutes.

    python -m bench.gpu_sweep --budget-s 570 --done bench/gpu_results.jsonl --out results
    python -m bench.gpu_sweep --compile --budget-s 570 --out results
    python -m bench.gpu_sweep --fold results/gpu_results.jsonl     rewrites kernels/measured.py
    python -m bench.gpu_sweep --dry --out results                  every step, without a GPU

In order: versions and ceilings; every variant compiled in processes of their own, selftest and the
GPU's tests beside them; equality of every variant; attention, products with the tower's epilogue,
rows and blocks beside torch; profiles; whole towers beside torch eager, as a graph and (--compile)
compiled; exits that no image takes. Each result is a line of JSON in OUT/gpu_results.jsonl, written
at once. What --done or that file holds for these kernels, this Triton and this GPU is not measured
again; a step is begun only if its estimate fits the time left.
"""

import argparse
import os
import sys
import time
from importlib import metadata
from pathlib import Path

from lraee.diagnostics import interpreter

DRY_ARGUMENT = "--dry"
FILE = "gpu_results.jsonl"
RESERVED_CORES = 1


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget-s", type=float, default=570.0, help="no step is begun after it")
    parser.add_argument("--done", type=Path, action="append", default=[], help="lines known before")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the lines")
    parser.add_argument("--step", action="append", help="only steps of this name; again for more")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument(DRY_ARGUMENT, action="store_true", help="tiny shapes, no GPU, no meaning")
    parser.add_argument("--fold", type=Path, help="lines that kernels/measured.py is made from")
    options = parser.parse_args()
    if options.fold is not None:
        from bench.gpu_sweep.fold import fold_file

        print("\n".join(fold_file(options.fold)))
        return
    _run(options)


def _run(options: argparse.Namespace) -> None:
    start = time.monotonic()
    from bench.gpu_sweep import equality_steps, kernel_steps, machine_steps, tower_steps
    from bench.gpu_sweep.lines import Results, kernels_hash
    from bench.gpu_sweep.run import Context, sweep
    from lraee.diagnostics import product_families, tune_run
    from lraee.diagnostics.selftest import describe

    try:
        target = tune_run.find_target("interpreter" if options.dry else "cuda")
    except NotImplementedError as error:
        reason = str(error).split(";")[0].removeprefix("tune: ")
        sys.exit(f"gpu_sweep: {reason}; --dry runs every step without a GPU")
    steps = (*machine_steps.STEPS, *equality_steps.STEPS, *kernel_steps.STEPS, *tower_steps.STEPS)
    chosen = [step for step in steps if options.step is None or step.name in options.step]
    cores = len(os.sched_getaffinity(0))
    workers = 1 if options.dry else max(1, cores - RESERVED_CORES)
    context = Context(target, has_compile=options.compile, workers=workers)
    results = Results(
        options.out / FILE, kernels_hash(), metadata.version("triton"),
        str(describe(target)["gpu"]), tuple(options.done),
    )  # fmt: skip
    for family in product_families.FAMILIES:
        # Before the first product: a check that begins beside the timings would disturb them
        product_families.failure(family, target)
    outcome = sweep(
        chosen, context, results, start + options.budget_s,
        report=lambda line: print(f"{time.monotonic() - start:6.1f} s  {line}", flush=True),
    )  # fmt: skip
    print(
        f"{results.written} lines in {options.out / FILE}: {len(outcome.measured)} measured,"
        f" {len(outcome.present)} known before, {len(outcome.failed)} failed,"
        f" {len(outcome.no_time)} without time"
    )
    if outcome.no_time:
        print(f"next: {outcome.no_time[0]}")
    sys.exit(1 if outcome.failed else 0)


if __name__ == "__main__":
    if DRY_ARGUMENT in sys.argv and os.environ.get(interpreter.VARIABLE) != "1":
        # Triton reads it when it is imported, which importing lraee's kernels does
        os.environ[interpreter.VARIABLE] = "1"
    main()
