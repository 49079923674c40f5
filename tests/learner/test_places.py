"""Other places: where the library is missing, where PyTorch does not exist, and which machines the lock is for."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement

from autograder.layout import ROOT
from autograder.learner import machine

PLATFORMS = {  # as markers see them
    "Linux x86-64": {"sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix"},
    "Linux Arm": {"sys_platform": "linux", "platform_machine": "aarch64", "os_name": "posix"},
    "Windows": {"sys_platform": "win32", "platform_machine": "AMD64", "os_name": "nt"},
    "macOS Arm": {"sys_platform": "darwin", "platform_machine": "arm64", "os_name": "posix"},
}
SYSTEMS = {"linux": "Linux", "win32": "Windows", "darwin": "Darwin"}
REMOVED = """aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap msilib nis
nntplib ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib"""
PYTHONS = ("3.11", "3.12", "3.13")


# --- a kernel without the library -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """The package as git has it, without the weights' megabytes."""
    root = tmp_path_factory.mktemp("repository") / "llm40"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("autograder", "llm40"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    return root


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Path:
    """A folder in the place of the registry, with the one package that is missing: a stand-in for pooch."""
    folder = tmp_path_factory.mktemp("registry")
    with zipfile.ZipFile(folder / "pooch-1.9.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pooch.py", "")
        wheel.writestr("pooch-1.9.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: pooch\nVersion: 1.9.0\n")
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("pooch-1.9.0.dist-info/WHEEL", tags)
        wheel.writestr("pooch-1.9.0.dist-info/RECORD", "")
    return folder


@pytest.fixture
def python(tmp_path) -> Path:
    """A fresh virtual environment that has what we have, as Colab has PyTorch, but neither us nor pooch."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.search("llm40|pooch", path.name):
            (packages / path.name).symlink_to(path)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    [site] = venv.glob("lib/python3*/site-packages")
    (site / "others.pth").write_text(str(packages), encoding="utf-8")
    return venv / "bin" / "python"


def run_first_cell(python: Path, folder: Path) -> str:
    """The last line of what the first code cell of a real lesson says, in a folder."""
    cells = json.loads(next((ROOT / "course").glob("*/02_*.ipynb")).read_text(encoding="utf-8"))["cells"]
    source = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
    command = [python, "-I", "-c", source]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stderr.strip().split("\n")[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="the paths of a POSIX environment")
@pytest.mark.parametrize("place", ["in the project", "elsewhere"])
def test_the_first_cell_says_the_line_that_sets_up_the_rest(python, repository, registry, tmp_path, place) -> None:
    folder = repository / "work" / "stage1" if place == "in the project" else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    said = run_first_cell(python, folder)
    found = re.fullmatch(r"ModuleNotFoundError: the course's library is not in this kernel\. .*  %pip (.+)", said)
    assert found, said
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = f"git+{project['urls']['Repository']}"
    assert (address in found[1]) == (place == "elsewhere")
    redirect = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": project["urls"]["Repository"]}
    redirect["GIT_CONFIG_KEY_0"] = f"url.{repository.as_uri()}.insteadOf"
    offline = ["--no-index", f"--find-links={registry}", "--no-build-isolation"]
    command = [python, "-m", "pip", *shlex.split(found[1].replace("-q", "", 1)), *offline]
    env = {**os.environ, **redirect}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    version = project["version"]
    assert f"Successfully installed llm40-{version} pooch-1.9.0\n" in done.stdout  # what is missing, and no more
    assert run_first_cell(python, folder) == ""
    imported = subprocess.run([python, "-c", "import llm40.profile"], cwd=tmp_path, capture_output=True, check=False)
    assert imported.returncode == 0, imported.stderr


# --- machines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "processor", "version", "more", "says"),
    [
        ("linux", "x86_64", (3, 11, 0), {}, ""),
        ("linux", "aarch64", (3, 13, 1), {}, ""),
        ("win32", "AMD64", (3, 12, 9), {"libc": ""}, ""),
        ("darwin", "arm64", (3, 13, 0), {"macos": "14.0", "libc": ""}, ""),
        ("darwin", "x86_64", (3, 12, 0), {"macos": "14.5"}, "this is a Mac with an Intel processor"),
        ("darwin", "arm64", (3, 12, 0), {"macos": "13.6.1"}, "this is macOS 13.6.1: update it"),
        ("linux", "x86_64", (3, 12, 0), {"libc": "none"}, "this Linux has no glibc"),
        ("linux", "i686", (3, 12, 0), {}, "this is linux on i686"),
        ("win32", "AMD64", (3, 12, 0), {"bits": 32}, "this Python is a 32-bit one"),
        ("win32", "ARM64", (3, 12, 0), {}, "this is Windows on ARM64"),
        ("linux", "x86_64", (3, 14, 0), {}, "LLM40 needs Python 3.11 to 3.13; this is 3.14.0"),
        ("linux", "x86_64", (3, 10, 2), {}, "LLM40 needs Python 3.11 to 3.13; this is 3.10.2"),
    ],
)
def test_where_pytorch_does_not_exist_the_set_up_says_so(system, processor, version, more, says) -> None:
    said = machine.find_trouble(system, processor, version, **more)
    assert (says in said) if says else said == ""
    assert "\n" not in said


def test_the_makefiles_ask_before_pip_does() -> None:
    """By a Python that has nothing of ours."""
    for makefile in (ROOT / "Makefile", ROOT / "autograder" / "learner" / "edition" / "Makefile"):
        text = makefile.read_text(encoding="utf-8")
        assert 0 < text.index("autograder/learner/machine.py") < text.index("-m venv") < text.index("-m pip")
    command = [sys.executable, "-I", "-S", str(ROOT / "autograder" / "learner" / "machine.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- the lock -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lock() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(("platform", "python"), list(itertools.product(PLATFORMS, PYTHONS)))
def test_the_lock_has_what_the_package_asks_for(lock, platform, python) -> None:
    """Offline: every requirement that holds on a machine has one version in the lock there, and an allowed one."""
    here = default_environment() | PLATFORMS[platform]
    here |= {"platform_system": SYSTEMS[here["sys_platform"]], "python_version": python}
    here |= {"python_full_version": f"{python}.9", "implementation_name": "cpython"}
    here["platform_python_implementation"] = "CPython"
    locked: dict[str, list[str]] = {}
    for one in lock:
        if one.marker is None or one.marker.evaluate(here):
            [pin] = one.specifier
            locked.setdefault(one.name, []).append(pin.version)
    assert not {name: versions for name, versions in locked.items() if len(versions) > 1}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["lab"]]:
        asked = Requirement(text)
        if asked.marker is None or asked.marker.evaluate(here):
            [version] = locked[asked.name.lower()]
            assert version in asked.specifier, f"{asked} has {version} in the lock"
    assert ("triton" in locked) == (here["sys_platform"] == "linux")


def test_the_workflow_resolves_the_lock_for_every_machine_and_python() -> None:
    """tests/platforms.py is what it runs: for each of them, wheels and nothing else."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "course.yml").read_text(encoding="utf-8"))
    runs = [step.get("run", "") for step in workflow["jobs"]["platforms"]["steps"]]
    assert any("tests/platforms.py" in run for run in runs)


def test_the_sources_are_python_of_all_three_without_a_warning() -> None:
    """What Python 3.12 and 3.13 warn of, such as `\\d` in a plain string, and the modules that they removed."""
    removed = set(REMOVED.split())
    code = "import sys, ast, pathlib\nfor p in sys.argv[1:]:\n  compile(pathlib.Path(p).read_text('utf-8'), p, 'exec')"
    files = [str(path) for folder in ("autograder", "llm40", "solutions") for path in (ROOT / folder).rglob("*.py")]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in files:
        imported = re.findall(r"^\s*(?:import|from) (\w+)", Path(file).read_text(encoding="utf-8"), re.MULTILINE)
        assert not removed & set(imported), file
