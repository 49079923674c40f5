"""Grading a class: throughput, beside stock `nbgrader autograde`; memory; whether a class changes anybody's score.

    make bench-grading                                    # or python -m benchmarks.grading
    make bench-grading STUDENTS=4 LESSONS="1 9" STOCK=1

A class is generated (grading_class.py) and graded with the grader's defaults while its memory is watched; some of its
notebooks are graded again each alone, and every score must be the same. Then some students' notebooks are graded by
us and by nbgrader's own command, one after the other: as they are, and without the experiments, which our grader skips.
Every time is that of a whole command, its start included, which is a good part of a small sample's; so the speed beside
stock is also given by the share that these notebooks had of the class's time. Exit code 1: a score differs, or the
grader failed.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
from tqdm import tqdm

from autograder.build import ROOT, Layout, build_sources
from autograder.catalog import Entry, NoSuchLesson, select
from autograder.pool import count_cores
from autograder.text import print_anything
from benchmarks import grading_stock
from benchmarks.grading_class import MISSING, SHARES, make_class
from benchmarks.grading_run import MIB, ROLES, Run, grade_alone, grade_class, time_command

OUT = ROOT / "build" / "bench_grading"
KEPT = ROOT / "benchmarks" / "results" / "grading.json"
RATIO, OVERHEAD, FLAT = 8.0, 0.5, 0.05  # the goals: times stock's speed, seconds, growth from first to last quarter
ONE_SECONDS, ONE_RATIO = 4.0, 4.0  # for a single notebook: seconds of the whole command, times stock's speed
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Options:
    students: int
    entries: list[Entry]
    stock: int
    alone: int
    jobs: int
    seed: int

    @property
    def source(self) -> Path:
        return Layout(ROOT).masters


# --- the measurements -----------------------------------------------------------------------------------------


def quarters(run: Run) -> dict:
    """MiB while the first and the last quarter of the class was graded, and the slope from first result to last."""
    done = sorted(record["at"] for record in run.records)
    samples = [(sum(at <= when for at in done), used) for when, used in run.memory if done[0] <= when <= done[-1]]
    parts = {
        "first": [used for count, used in samples if count <= len(done) / 4],
        "last": [used for count, used in samples if count > len(done) * 3 / 4],
    }
    if min(map(len, parts.values())) < 2:
        return {}
    found = {name: _memory(part) for name, part in parts.items()}
    totals = [sum(used.values()) / MIB for _, used in samples]
    slope = statistics.linear_regression([count for count, _ in samples], totals).slope
    thin = samples[:: max(1, len(samples) // 200)]
    return found | {
        "growth": found["last"]["median"] / found["first"]["median"] - 1,
        "slope_per_100_notebooks": 100 * slope,
        "peak": max(totals),
        "samples": [[count, *(round(used[role] / MIB, 1) for role in ROLES)] for count, used in thin],
    }


def _memory(part: Sequence[dict[str, int]]) -> dict[str, float]:
    found = {role: statistics.median(used[role] for used in part) / MIB for role in ROLES}
    totals = [sum(used.values()) / MIB for used in part]
    return {"median": statistics.median(totals), "peak": max(totals), **found}


def throughput(run: Run, jobs: int) -> dict:
    """Of the notebooks that were handed in; what nobody handed in takes no time and is not counted."""
    graded = [record for record in run.records if record["status"] != "missing"]
    count = len(graded)
    return {
        "notebooks": count,
        "seconds": run.seconds,
        "notebooks_per_second": count / run.seconds,
        "seconds_per_notebook": run.seconds / count,
        "task_seconds": statistics.mean(record["seconds"] for record in graded),
        "writing_seconds": statistics.mean(record["writing"] for record in graded),
        "overhead_seconds": _spread([record["seconds"] - record["cells"] for record in graded]),
        # Of a job's time: the start, waiting for a notebook or for the end; also for its writing, where that is slower.
        "job_seconds_outside_tasks": run.seconds * jobs / count - statistics.mean(r["seconds"] for r in graded),
        "states": dict(Counter(record["status"] for record in graded)),
        "by_lesson": {
            lesson: statistics.median(r["seconds"] for r in graded if r["lesson"] == lesson)
            for lesson in sorted({record["lesson"] for record in graded})
        },
    }


def alone(run: Run, submitted: Path, options: Options) -> dict:
    """Some notebooks each graded alone: what differs from the class, and whose scores do.

    What a check says can differ where the score does not: a wrong kernel that reads beyond its array finds anything.
    """
    graded = [record for record in run.records if record["status"] != "missing"]
    chosen = random.Random(options.seed).sample(graded, min(options.alone, len(graded)))
    differences, other_scores = [], []
    for record in tqdm(chosen, unit="notebook", desc="each alone", dynamic_ncols=True):
        found = grade_alone(submitted, options.source, record["student"], record["lesson"])
        who = f"{record['student']} {record['lesson']}"
        differences += [f"{who}: {line}" for line in differing(record, found)]
        if scores_of(record) != scores_of(found):
            other_scores.append(who)
    return {"notebooks": len(chosen), "other_scores": other_scores, "differences": differences}


def scores_of(verdict: dict) -> tuple:
    """The state of a notebook and what each check gave."""
    return verdict["status"], {check["check"]: check["score"] for check in verdict["checks"]}


def differing(one: dict, other: dict) -> list[str]:
    """Where two verdicts on the same notebook are not the same, a line for each."""
    lines = [
        f"{what} {one[what]!r} in the class, {other[what]!r} alone"
        for what in ("status", "score", "flags")
        if one[what] != other[what]
    ]
    mine, theirs = ({check["check"]: check for check in verdict["checks"]} for verdict in (one, other))
    for check in sorted(mine.keys() | theirs.keys()):
        if mine.get(check) != theirs.get(check):
            lines.append(f"{check}: {mine.get(check)} in the class, {theirs.get(check)} alone")
    return lines


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "mean": statistics.mean(values), "max": max(values)}


def beside_stock(submitted: Path, run: Run, options: Options) -> dict:
    """The same notebooks by us, by us in one process, by nbgrader, and by nbgrader without the experiments."""
    everyone = sorted(path.name for path in submitted.iterdir())
    chosen = sorted(random.Random(options.seed).sample(everyone, min(options.stock, len(everyone))))
    sample = OUT / "sample" / "submitted"
    shutil.rmtree(sample.parent, ignore_errors=True)
    for student in chosen:
        shutil.copytree(submitted / student, sample / student)
    alone = len(list(sample.glob("*/*/*.ipynb"))) == 1
    single = time_command(sample, sample.parent / "grades, one notebook") if alone else None
    ours = grade_class(sample, sample.parent / "grades", options.source, options.jobs)
    one_job = grade_class(sample, sample.parent / "grades, one job", options.source, 1)
    sources = [options.source / f"{entry.key}.ipynb" for entry in options.entries]
    stock = {
        "as it is": grading_stock.autograde(sample, sources, True, "nbgrader autograde"),
        "without experiments": grading_stock.autograde(sample, sources, False, "the same, no experiments"),
    }
    scores = {(r["student"], r["lesson"]): r["score"] for r in ours.records if r["status"] != "missing"}
    outside = throughput(run, options.jobs)["job_seconds_outside_tasks"]
    seconds = [r["seconds"] + outside for r in run.records if (r["student"], r["lesson"]) in scores]
    share = sum(seconds) / options.jobs
    return {
        "students": chosen,
        "notebooks": len(scores),
        "seconds": ours.seconds,
        "seconds_of_the_command": single,
        "seconds_one_job": one_job.seconds,
        "seconds_in_the_class": share,
        **{
            name: {
                "seconds": found.seconds,
                "graded": len(found.scores),
                "ratio": found.seconds / (single or ours.seconds),
                "ratio_one_job": found.seconds / one_job.seconds,
                "ratio_in_the_class": found.seconds / share,
                "other_scores": [
                    f"{' '.join(who)}: {score:g} by nbgrader, {scores[who]:g} by us"
                    for who, score in sorted(found.scores.items())
                    if score != scores[who]
                ],
                "log": found.log if len(found.scores) < len(scores) else "",
            }
            for name, found in stock.items()
        },
    }


def machine(options: Options) -> dict:
    """Where this was measured, and how busy that was before."""
    info = Path("/proc/cpuinfo")
    models = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": count_cores(),
        "jobs": options.jobs,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "ipykernel", "nbgrader", "distributed")},
        "commit": commit.stdout.strip() or "unknown",
    }


# --- what is shown --------------------------------------------------------------------------------------------


def rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, how much, the goal)"""
    speed, memory, single = result["throughput"], result["memory"], result["alone"]
    found = [
        ("what became of the notebooks", ", ".join(f"{n} {state}" for state, n in speed["states"].items()), ""),
        ("notebooks per second", f"{speed['notebooks_per_second']:.2f}", ""),
        ("seconds per notebook", f"{speed['seconds_per_notebook']:.2f}", ""),
        ("a notebook's own seconds in its process, mean", f"{speed['task_seconds']:.2f}", ""),
        ("seconds to write its result down, mean", f"{speed['writing_seconds']:.3f}", ""),
    ]
    over = speed["overhead_seconds"]
    total = over["median"] + speed["writing_seconds"]
    found += [
        ("overhead beyond its cells, median (mean)", f"{over['median']:.2f} ({over['mean']:.2f}) s", ""),
        ("overhead and writing", f"{total:.2f} s", _goal(total <= OVERHEAD, f"{OVERHEAD:g} s")),
    ]
    if single:
        found += [
            (
                "notebooks with another score, each alone",
                f"{len(single['other_scores'])} of {single['notebooks']}",
                _goal(not single["other_scores"], "none"),
            ),
            ("other differences, in what a check says", f"{len(single['differences'])}", ""),
        ]
    if memory:
        first, last = memory["first"], memory["last"]
        found += [
            ("memory in the first quarter, median (peak)", f"{first['median']:.0f} ({first['peak']:.0f}) MiB", ""),
            ("memory in the last quarter", f"{last['median']:.0f} ({last['peak']:.0f}) MiB", ""),
            ("growth", f"{memory['growth']:+.1%}", _goal(memory["growth"] <= FLAT, f"flat: {FLAT:.0%} at most")),
            ("slope", f"{memory['slope_per_100_notebooks']:+.1f} MiB per 100 notebooks", ""),
        ] + [(f"of it the {role}", f"{first[role]:.0f} → {last[role]:.0f} MiB", "") for role in ROLES]
    single = result["stock"] and result["stock"]["seconds_of_the_command"]
    if single:
        met = _goal(single <= ONE_SECONDS, f"{ONE_SECONDS:g} s")
        found.append(("seconds of `make grade` for this one notebook, start to end", f"{single:.1f}", met))
    least = ONE_RATIO if single else RATIO
    for name in ("as it is", "without experiments"):
        if result["stock"]:
            stock = result["stock"][name]
            goal = _goal(stock["ratio"] >= least, f"{least:g}") if name == "as it is" else ""
            found += [
                (f"times the speed of nbgrader autograde, {name}", f"{stock['ratio']:.2f}", goal),
                ("— by their share of the class's time", f"{stock['ratio_in_the_class']:.2f}", ""),
                ("— with one process of ours", f"{stock['ratio_one_job']:.2f}", ""),
            ]
    return found


def _goal(met: bool, text: str) -> str:
    return f"{text} {'✓' if met else '✗ missed'}"


def markdown(result: dict) -> str:
    where, made = result["machine"], result["class"]
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in made["shares"].items())
    lines = [
        f"# Grading {made['students']} students",
        "",
        f"{result['date']}, {where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, {where['system']}; "
        f"Python {where['python']}, PyTorch {where['torch']}, nbgrader {where['nbgrader']}; commit {where['commit']}. "
        f"{where['jobs']} processes. Load before: {', '.join(map(str, where['load_before']))}.",
        "",
        f"{made['notebooks']} notebooks of lessons {', '.join(name[:2] for name in made['lessons'])}; "
        f"exercises: {shares}; seed {made['seed']}.",
        "",
        "| | | goal |",
        "|---|--:|---|",
        *(f"| {what} | {much} | {goal} |" for what, much, goal in rows(result)),
    ]
    if result["stock"]:
        stock = result["stock"]
        lines += [
            "",
            f"Beside nbgrader: {stock['notebooks']} notebooks of {', '.join(stock['students'])}; "
            f"{stock['seconds']:.0f} s by us, {stock['seconds_one_job']:.0f} s in one process; "
            f"{stock['seconds_in_the_class']:.0f} s of the class's.",
        ]
        for name in ("as it is", "without experiments"):
            found = stock[name]
            text = f"- nbgrader {name}: {found['seconds']:.0f} s, {found['graded']} graded"
            lines.append("; ".join([text, *found["other_scores"]]))
    lines += ["", *(f"- differs: {line}" for line in (result["alone"] or {}).get("differences", ()))]
    return "\n".join(lines).strip() + "\n"


# --- the command ----------------------------------------------------------------------------------------------


def measure(options: Options) -> tuple[dict, int]:
    """The result, and how many notebooks our grader failed on."""
    found = machine(options)
    submitted, grades = OUT / "class" / "submitted", OUT / "class" / "grades"
    shutil.rmtree(OUT / "class", ignore_errors=True)
    made = make_class(submitted, options.entries, options.students, options.seed)
    run = grade_class(submitted, grades, options.source, options.jobs, watch=True)
    faults = [record for record in run.records if record["status"] == "fault"]
    for record in faults:
        print(f"the grader failed on {record['student']} {record['lesson']}: {record['flags'][-1]}", file=sys.stderr)
    return {
        "what": "a generated class graded, and some of it by nbgrader autograde in the same run",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": found,
        "class": {
            "students": options.students,
            "lessons": [entry.name for entry in options.entries],
            "seed": options.seed,
            "notebooks": len(made),
            "shares": SHARES,
            "missing": MISSING,
        },
        "throughput": throughput(run, options.jobs),
        "memory": quarters(run),
        "alone": alone(run, submitted, options) if options.alone else None,
        "stock": beside_stock(submitted, run, options) if options.stock else None,
    }, len(faults)


def lessons(wanted: str) -> list[Entry]:
    """`1 9`, `1,9` or nothing, which means all that are written."""
    written = Layout(ROOT).list_written()
    chosen = {entry for number in wanted.replace(",", " ").split() for entry in select(number)} or set(written)
    missing = chosen - set(written)
    if missing:
        raise NoSuchLesson(f"not written yet: {', '.join(sorted(entry.name for entry in missing))}")
    return [entry for entry in written if entry in chosen]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=positive, default=100, help="in the class")
    parser.add_argument("--lessons", default="", help="their numbers, as in '1 9'; by default all that are written")
    parser.add_argument("--stock", type=int, default=2, help="students whose notebooks nbgrader grades too; 0: none")
    parser.add_argument("--alone", type=int, default=20, help="notebooks to grade again, each alone; 0: none")
    parser.add_argument(
        "--jobs", type=positive, default=count_cores(), help="processes that grade; by default the cores"
    )
    parser.add_argument("--seed", type=int, default=40, help="of the class and of what is drawn from it")
    parser.add_argument("--keep", action="store_true", help=f"write the result to {KEPT.relative_to(ROOT)} too")
    given = parser.parse_args()
    print_anything()
    for name in (*THREADS, "PYTHONDONTWRITEBYTECODE"):  # every grader by its own default, and compiled once
        os.environ.pop(name, None)
    try:
        entries = lessons(given.lessons)
    except NoSuchLesson as error:
        parser.error(str(error))
    if build_sources([entry.key for entry in entries]):
        sys.exit(1)
    options = Options(given.students, entries, given.stock, given.alone, given.jobs, given.seed)
    result, faults = measure(options)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    for path in (OUT / "grading.json", *([KEPT] if given.keep else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (OUT / "grading.md").write_text(markdown(result), encoding="utf-8")
    print(f"\n{markdown(result)}\nIn {OUT}: grading.json, grading.md, and what was graded.")
    sys.exit(1 if faults or (result["alone"] or {}).get("other_scores") else 0)


if __name__ == "__main__":
    main()
