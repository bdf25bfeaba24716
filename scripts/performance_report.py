"""Puts what `kvsluice bench` measured into docs/performance.md and draws docs/images/, and what requests write to a
store into docs/store.md. The measured numbers come from benchmarks/results/bench_*.json; what was not measured says so.
With --check it only says whether pages and images hold all that."""

from __future__ import annotations

import sys
from pathlib import Path

from kvsluice.benchmarks import performance
from kvsluice.benchmarks.bench_decode import STEP
from kvsluice.benchmarks.bench_prefill import FIRST_TOKEN
from kvsluice.benchmarks.bench_results import load
from kvsluice.benchmarks.performance import File
from kvsluice.benchmarks.stored_bytes import stored_table
from kvsluice.errors import KvsluiceError
from kvsluice.evals.pages import filled, make_or_check

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs") / "performance.md"
STORE_PAGE = Path("docs") / "store.md"
RESULTS = Path("benchmarks") / "results"
PLOTS = {
    "step parts": (STEP, Path("docs/images/bench_step.svg")),
    "prompt parts": (FIRST_TOKEN, Path("docs/images/bench_prompt.svg")),
}


def wanted(root: Path) -> dict[Path, str]:
    """Pages and images as they should be, by path; "" for an image that should not be there.

    Raises:
        InvalidRequest: a file of results is none.
        ValueError: a page lacks a block.
    """
    files = [File(path.stem, load(path)) for path in sorted((root / RESULTS).glob("bench_*.json"))]
    blocks = {
        "origins": performance.origins(files),
        "goals": performance.goals_table(files),
        "prefill": performance.prefill_table(files),
        "decode": performance.decode_table(files),
        "service": performance.service_table(files),
        "tiers": performance.tiers_table(files),
        "failover": performance.failover_table(files),
        "store": performance.store_table(files),
        "kernels": performance.kernels_table(files),
    }
    made = {}
    for name, (what, path) in PLOTS.items():
        made[path] = performance.parts_plot(files, what)
        link = f"![kinds of work]({path.relative_to(PAGE.parent)})"
        blocks[name] = link if made[path] else performance.NOT_MEASURED
    made[STORE_PAGE] = filled((root / STORE_PAGE).read_text(), {"stored bytes": stored_table()}, str(STORE_PAGE))
    return made | {PAGE: filled((root / PAGE).read_text(), blocks, str(PAGE))}


def main(root: Path = ROOT) -> int:
    try:
        status: int = make_or_check(root, wanted, sys.argv[1:])
    except KvsluiceError as exc:
        print(f"performance_report: {exc.message}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
