"""Makes such models as lie in weights/, with its tokenizer: `python -m llm40.models.make --out build/models`.

Each stage is a command of its own, which goes on where it was interrupted, and has nothing to do where it has ended.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from llm40.models.weights import CHECKPOINTS

KEEP = " ".join(name.partition("-step")[2] for name in CHECKPOINTS)
# First text alone, then text with recall documents. `small` has two decays, as it went on after its first end.
STAGES = [
    "train --size tiny --steps 1655 --learning-rate 0.005 --batch 8 --out {out}/text",
    "train --size small --steps 7341 --learning-rate 0.004 --batch 4 --out {out}/text",
    f"train --size tiny --start {{out}}/text --recall 0.2 --steps 700 --keep {KEEP} --learning-rate 0.002 --warmup 20 "
    "--out {out}",
    "train --size small --start {out}/text --recall 0.4 --steps 158 --learning-rate 0.0015 --warmup 20 --out {out}",
    "train --size small --start {out}/text --recall 0.3 --steps 390 --learning-rate 0.001 --warmup 20 --out {out}",
    "train --size small-mtp --start {out} --recall 0.1 --steps 600 --learning-rate 0.003 --warmup 20 --out {out}",
    "scaling --out {out}",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/models"))
    parser.add_argument("--list", action="store_true", help="show the commands, run none")
    arguments = parser.parse_args()
    for stage in STAGES:
        module, *words = (word.format(out=arguments.out) for word in stage.split())
        print(f"python -m llm40.models.{module} {shlex.join(words)}", flush=True)
        if not arguments.list:
            subprocess.run([sys.executable, "-m", f"llm40.models.{module}", *words], check=True)


if __name__ == "__main__":
    main()
