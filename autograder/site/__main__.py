"""`python -m autograder.site`: the command of `make site`."""

import argparse
import sys
from pathlib import Path

from autograder.layout import ROOT
from autograder.site.build import make_site


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m autograder.site", description="Make the course's site.")
    parser.add_argument(
        "--out", type=Path, help="the folder for it; by default build/site, with answers build/site-solutions"
    )
    parser.add_argument("--repository", help="the address of the git repository that lessons are cloned from")
    parser.add_argument("--solutions", action="store_true", help="the instructors' site, with answers and hidden tests")
    options = parser.parse_args()
    out = options.out or ROOT / "build" / ("site-solutions" if options.solutions else "site")
    return make_site(out.expanduser(), repository=options.repository, solutions=options.solutions)


if __name__ == "__main__":
    sys.exit(main())
