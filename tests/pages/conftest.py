"""A browser, and a JupyterLab that knows nothing of the user's settings."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
FLAGS = [
    "--no-sandbox",  # Chromium's own sandbox does not start as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, without a window. Not longer: Playwright keeps an event loop running."""
    path = _chromium()
    if path is None:
        pytest.skip("no Chromium on this machine: install it (Debian: apt-get install chromium) to test the pages")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def panel() -> str:
    """nbgrader's tab for instructors, at the right side of JupyterLab."""
    return "[title='Nbgrader Create Assignment']"


@pytest.fixture
def screenshot():
    """Saves a page's picture as build/screenshots/<name>.png, for a person to look at."""

    def save(page, name: str, full_page: bool = True) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=full_page)

    return save


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Lab:
    """A running JupyterLab, its address and its token."""

    def __init__(self, port: int, token: str):
        self.url = f"http://127.0.0.1:{port}"
        self.token = token
        self.said = ""  # on the terminal, until it answered

    def page(self, path: str) -> str:
        return f"{self.url}/lab/tree/{path}?token={self.token}&reset"

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/api?token={self.token}", timeout=2).status == 200
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Starts JupyterLab in a project's folder, on its course/index.ipynb or as a learner's `make lab` does."""
    servers = []

    def start(project: Path, learner: bool = False) -> Lab:
        home = tmp_path_factory.mktemp("home")
        for extension, values in {
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "notebook-extension/tracker": {"windowingMode": "none"},  # every cell in the page, not only those in view
        }.items():
            settings = home / "settings" / "@jupyterlab" / f"{extension}.jupyterlab-settings"
            settings.parent.mkdir(parents=True)
            settings.write_text(json.dumps(values), encoding="utf-8")
        lab = Lab(_free_port(), secrets.token_hex(16))
        env = {
            **os.environ,
            "HOME": str(home),
            "JUPYTER_CONFIG_DIR": str(home / "config"),
            "JUPYTER_DATA_DIR": str(home / "data"),
            "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
            "IPYTHONDIR": str(home / "ipython"),
            "JUPYTER_TOKEN": lab.token,
        }
        port = f"--port={lab.url.rsplit(':', 1)[1]}"
        options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", port, "--ServerApp.port_retries=0"]
        command = [sys.executable, "-m", "jupyterlab", "course/index.ipynb", *options]
        if learner:
            code = "import sys, pathlib; from autograder.learner.lab import open_lab; "
            code += "open_lab(None, sys.argv[2:], pathlib.Path(sys.argv[1]))"
            command = [sys.executable, "-c", code, str(project), *options]
            env["PYTHONPATH"] = str(ROOT)
        log = (home / "log").open("wb")
        server = subprocess.Popen(command, cwd=project, env=env, stdout=log, stderr=subprocess.STDOUT)
        servers.append((server, log))
        end = time.monotonic() + 60
        while not lab.answers():
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(f"JupyterLab did not start:\n{(home / 'log').read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        lab.said = (home / "log").read_text(encoding="utf-8", errors="replace")
        return lab

    yield start
    for server, log in servers:
        server.terminate()  # it shuts its kernels down
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()
