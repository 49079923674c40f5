"""What a machine with PyTorch and a GPU, but no network, lacks for `make gpu`: wheels, and the built notebooks.

    make gpu-wheels                      # python -m benchmarks.wheels → build/gpu-wheels/
    # then, on that machine, with build/gpu-wheels/ beside the sources:
    python3 -m pip install --no-index --no-deps --target /tmp/site build/gpu-wheels/*.whl
    PYTHONPATH=/tmp/site python3 -m benchmarks.gpu

Packages are those that papermill, ipykernel, jupytext and the course import, with all that these need, at the versions
of this environment; left out is what an installation of PyTorch for science has (`THERE`). Liger's kernels, a peer of
the course's, come along. The notebooks are built here, since the builder needs nbgrader.
"""

import argparse
import importlib.metadata as metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu-wheels"
PYTHON = "3.12"
LIMIT = 40 * 2**20  # bytes
NEEDED = (
    *("papermill", "ipykernel", "jupytext", "pooch", "babel", "typer", "rich", "jinja2", "psutil", "tqdm"),
    *("fastapi", "uvicorn", "openai", "httpx"),  # lesson 34
)
PEERS = ("liger-kernel==0.8.5",)  # needs PyTorch and Triton only
# Large, or in every such environment; what only these need is not followed either.
THERE = {
    *("torch", "triton", "numpy", "scipy", "matplotlib", "seaborn", "scikit-learn", "pandas", "pillow", "setuptools"),
    *("safetensors", "tokenizers", "threadpoolctl", "jinja2", "markupsafe", "psutil", "tqdm", "rich", "typer"),
    *("packaging", "pygments", "pyyaml", "requests", "urllib3", "certifi", "idna", "charset-normalizer", "click"),
    *("typing-extensions", "markdown-it-py", "mdurl", "six", "python-dateutil", "attrs", "aiohttp", "shellingham"),
}
# The tags that pip takes for the platform: it matches each exactly.
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux_2_12", "manylinux_2_5")
OLD_PLATFORMS = ("manylinux2014", "manylinux2010", "manylinux1")


def closure(roots: tuple[str, ...] = NEEDED) -> dict[str, str]:
    """{package: version} of all that these need in Python 3.12 on Linux, as installed here, but for what is there."""
    surroundings = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.0",
        "sys_platform": "linux",
        "extra": "",
    }
    surroundings |= {"platform_system": "Linux", "os_name": "posix", "platform_python_implementation": "CPython"}
    surroundings |= {"implementation_name": "cpython", "platform_machine": "x86_64"}
    found: dict[str, str] = {}
    waiting = [canonicalize_name(name) for name in roots]
    while waiting:
        name = waiting.pop()
        if name in found or name in THERE:
            continue
        installed = metadata.distribution(name)
        found[name] = installed.version
        for text in installed.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(surroundings):
                waiting.append(canonicalize_name(requirement.name))
    return dict(sorted(found.items()))


def command(packages: list[str], folder: Path) -> list[str]:
    platforms = [f"{name}_x86_64" for name in (*PLATFORMS, *OLD_PLATFORMS)]
    options = [option for platform in platforms for option in ("--platform", platform)]
    target = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:", "--no-deps"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    return [*pip, *target, *options, "--dest", str(folder), *packages]


def build_notebooks(folder: Path) -> None:
    """All lessons with their answers, as the builder makes them."""
    from autograder.build import build_sources

    keys = sorted(f"{path.parent.name}/{path.stem}" for path in ROOT.glob("solutions/stage*/*.py"))
    if build_sources(keys):
        raise SystemExit("the notebooks could not be built: see above")
    for key in keys:
        target = folder / f"{key}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "build" / "source" / f"{key}.ipynb", target)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="say what would be gathered; fetch nothing")
    options = parser.parse_args()
    packages = [f"{name}=={version}" for name, version in closure().items()] + list(PEERS)
    if options.list:
        print("\n".join(packages))
        return 0
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    subprocess.run(command(packages, FOLDER), check=True)
    build_notebooks(FOLDER / "notebooks")
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    wheels = len(list(FOLDER.glob("*.whl")))
    # Names are compared as pip writes them: a package that pip left out would be missed only on the other machine.
    missing = [p for p in packages if not any(FOLDER.glob(f"{re.sub(r'[-.]+', '_', p.partition('==')[0])}-*.whl"))]
    print(f"{FOLDER.relative_to(ROOT)}: {wheels} wheels for Python {PYTHON} and the notebooks, {size / 2**20:.1f} MiB")
    if missing:
        print(f"without a wheel: {', '.join(missing)}", file=sys.stderr)
    if size > LIMIT:
        print(f"more than {LIMIT / 2**20:.0f} MiB: a name belongs into THERE", file=sys.stderr)
    return 1 if missing or size > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
