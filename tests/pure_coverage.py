"""How much of the pure modules their own tests run: python -m tests.pure_coverage   (or make coverage)

Lines that only tests of a whole run reach do not count. Ends with 1 below MIN_PERCENT, of all pure
modules together, or below MIN_PERCENT_OF_ONE in one of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import coverage

from tests.import_layers import layer_of, read_modules

ROOT = Path(__file__).resolve().parent.parent
MIN_PERCENT, MIN_PERCENT_OF_ONE = 95.0, 85.0
# A single process and nothing trained. Left out by name: several processes, and long runs of statistics.
TESTS = (
    "advantage_estimators",
    "advantages",
    "answers",
    "apo_variants",
    "batch_wide_losses",
    "bootstrap",
    "bounded_ratio",
    "comparison",
    "hf_config",
    "layout_rules",
    "metric_sums",
    "mismatch",
    "objective_call",
    "objective_metrics",
    "objectives",
    "overlong",
    "pass_at_k",
    "pass_at_k_advantages",
    "planning",
    "policy_losses",
    "sequence_corrections",
    "sequence_losses",
    "top_tokens",
    "risk_advantages",
    "sample_allocations",
    "sample_filters",
    "unread_settings",
    "visited_advantages",
    "weight_names",
    "weights",
)
LONG = " or ".join(
    ("stream_gives_every_rank", "scores_are_those", "cover_the_truth", "uniform_where", "their_coverage")
)


def pure_files() -> list[str]:
    """Paths of the pure modules, as in the table of layers."""
    modules = read_modules(ROOT)
    names = [name for name in modules if layer_of(name) == "pure"]
    return [
        "/".join(name.split(".")) + ("/__init__.py" if modules[name].is_package else ".py") for name in names
    ]


def measure(folder: Path) -> dict[str, tuple[int, int]]:
    """File -> statements, and those of them that were run. Raises CalledProcessError where a test fails."""
    data = folder / "data"
    run = [sys.executable, "-m", "coverage", "run", f"--data-file={data}", "--source=apo_megatron"]
    tests = [f"tests/test_{name}.py" for name in TESTS]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", "-k", f"not ({LONG})", *tests]
    subprocess.run([*run, *pytest], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    report = coverage.Coverage(data_file=str(data), config_file=False)
    report.load()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(ROOT):
        report.json_report(outfile=str(folder / "report.json"), include=[str(ROOT / f) for f in pure_files()])
    found = json.loads((folder / "report.json").read_text())["files"]
    return {
        Path(name).as_posix(): (file["summary"]["num_statements"], file["summary"]["covered_lines"])
        for name, file in found.items()
    }


def main() -> int:
    """Print what is below its bound, and the total."""
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder))
    statements, covered = (sum(values) for values in zip(*lines.values(), strict=True))
    percent = 100 * covered / statements
    low = {
        name: 100 * hit / all_
        for name, (all_, hit) in lines.items()
        if all_ and hit < MIN_PERCENT * all_ / 100
    }
    for name, value in low.items():
        print(f"{value:5.1f} %  {name}")
    print(f"{percent:5.1f} %  of {statements} statements in {len(lines)} pure modules")
    return int(percent < MIN_PERCENT or min(low.values(), default=100.0) < MIN_PERCENT_OF_ONE)


if __name__ == "__main__":
    sys.exit(main())
