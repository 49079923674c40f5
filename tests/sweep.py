"""Whether a check decides differently at another seed: each check of a lesson against the reference, over many seeds.

    make sweep LESSON=09 [CHECK=3a] [SEEDS=1000] [SECONDS_EACH=60]
    python tests/sweep.py 09 [--check 3a] [--seeds 1000] [--seconds 60]

A check that refuses a right answer at one seed of a thousand is a fault. The notebook is walked through once; where a
check stands, a forked process runs it at seed after seed (LLM40_SEED), for at most so many seconds. Checks that draw
nothing are run once. A seed that fails is tried again in a process of its own; exit 1 where one fails.
"""

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import answers_worker as worker  # noqa: E402

from autograder.lesson import read_lesson  # noqa: E402
from autograder.text import print_anything  # noqa: E402

TOLD = 3  # failing seeds of one check that are told in full


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", help="its number")
    parser.add_argument("--check", help="only the one of this number, such as 3a")
    parser.add_argument("--seeds", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="the most that one check may take (default 60)")
    chosen = parser.parse_args()
    print_anything()
    found = sorted((ROOT / "solutions").glob(f"*/{chosen.lesson.zfill(2)}_*.py"))
    if len(found) != 1:
        print(f'no lesson "{chosen.lesson}" in solutions/: its number is asked for, such as 09', file=sys.stderr)
        return 2
    cells = read_lesson(found[0]).cells
    numbers = [cell.number for cell in cells if cell.role == "check"]
    if chosen.check not in (None, *numbers):
        print(f"{found[0].stem} has no check {chosen.check}; it has {', '.join(numbers)}", file=sys.stderr)
        return 2
    shell = worker.new_shell()
    tried = failed = 0
    for cell in cells:
        if cell.kind != "code" or cell.role == "experiment":
            continue
        if cell.role == "check":
            if chosen.check not in (None, cell.number):
                continue
            name = f"{chosen.lesson.zfill(2)} check {cell.number} ({cell.name})"
            seeds, failures = sweep(shell, cell.source, chosen.seeds, chosen.seconds)
            print(f"{name}: {seeds} seeds, {len(failures)} fail" if seeds else f"{name}: draws nothing", flush=True)
            for seed, error in failures[:TOLD]:
                print(f"    LLM40_SEED={seed}: {error}", flush=True)
            tried, failed = tried + seeds, failed + len(failures)
        elif error := worker.run(shell, cell.source):
            raise SystemExit(f"the reference itself fails, in line {cell.line}: {error}")
    print(f"{found[0].stem}: {tried} runs, {failed} fail")
    return 1 if failed else 0


def sweep(shell, source: str, seeds: int, seconds: float) -> tuple[int, list[tuple[int, str]]]:
    """How many seeds a check was run at, 0 where it draws nothing, and those at which it fails: (seed, error)."""
    every = range(1, seeds + 1)
    lines, why = worker.in_child(lambda report: run_at(shell, source, every, seconds, report), 3 * seconds)
    if why:
        return len(lines), [(len(lines) + 1, why)]
    failures = []
    for seed in (line["seed"] for line in lines if line["error"]):
        alone, why = worker.in_child(lambda report, s=seed: run_at(shell, source, [s], seconds, report), 3 * seconds)
        error = alone[0]["error"] if alone else why
        failures.append((seed, error or "fails after other seeds, not alone: what the check changes outlives it"))
    return sum(line["drawn"] for line in lines), failures


def run_at(shell, source: str, seeds, seconds: float, report) -> None:
    """In the child: run the check at each seed as long as there is time, and report what it raised."""
    from llm40 import checks

    asked = []
    seed_of_run = checks.seed
    # Checks ask by this name, and generators by that of their module.
    checks.seed = checks.inputs.seed = lambda: asked.append(True) or seed_of_run()
    begun = time.monotonic()
    for seed in seeds:
        os.environ["LLM40_SEED"] = str(seed)
        error = worker.run(shell, source)
        report(seed=seed, error=error[:2000], drawn=bool(asked))
        if not asked or time.monotonic() - begun > seconds:
            return


if __name__ == "__main__":
    sys.exit(main())
