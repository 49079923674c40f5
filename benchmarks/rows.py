"""Rows of results: where they lie, how they are written, and how they read. Imports neither PyTorch nor the course."""

import json
import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def lesson_path(number: str) -> Path:
    [path] = ROOT.glob(f"solutions/stage*/{number}_*.py")
    return path


def write(path: Path, content: dict) -> None:
    """All or nothing: a run that is cut short leaves the file as it was before or after."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def describe(row: dict) -> str:
    """A row of any kind as a line of the terminal."""
    key = row["key"]
    if "error" in row:
        return f"{key}: {row['error']}"
    if "ratios" in row:
        peers = ", ".join(f"{ratio:.2f} × {name}" for name, ratio in row["ratios"].items())
        goals = [f"{g['peer']} {g['ratio']}, {'met' if g['met'] else 'missed'}: {g['at_least']}" for g in row["goals"]]
        line = f"{key}: {row['speed'][row['ours']]:.4g} {row['unit']}; {peers}"
        return line + (f"; goals: {'; '.join(goals)}" if goals else "")
    if "worst" in row:
        what, error, limit = (row["worst"][name] for name in ("what", "error", "limit"))
        judged = f"{row['results']} results of {row['shapes']} shapes"
        return f"{key}: {judged}; worst {what} {error:.1e}, {limit:.1e} allowed"
    if "kernels" in row:
        made = ", ".join(f"{name} ({found['variants']})" for name, found in row["kernels"].items())
        return f"{key}, {row['target']}: {made}"
    if "mfu" in row:
        mfu = ", ".join(f"{100 * share:.1f} % {name}" for name, share in row["mfu"].items())
        first, last = row["loss"].values()
        speed = f"{row['tokens_per_second']:,.0f} tokens/s, {row['steps']} steps in {row['minutes']:.1f} min"
        return f"{key}: {speed}, MFU {mfu}; loss {first:.2f} → {last:.2f} nats per token"
    if "gpu_bytes" in row:
        return f"{key}: {row['seconds']} s, {(row['gpu_bytes'] or 0) / 2**30:.1f} GiB of the GPU's memory"
    if "rehearsed" in row:
        return f"{key}: rehearsed {', '.join(row['rehearsed'])}; not here: {', '.join(row['missing']) or 'nothing'}"
    return key
