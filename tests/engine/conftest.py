"""A PostgreSQL server and a Dask cluster for the tests of the engine, each started for real."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from classroom import PostgreSQL, free_port, process_of_its_own, programs, wait_until


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    found = programs()
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    with tempfile.TemporaryDirectory(prefix="llm40-pg-") as folder:
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        server = PostgreSQL(found, Path(folder), free_port())
        server.run("initdb", "-D", f"{folder}/data", "-U", "grader", "-A", "trust", "-E", "UTF8")
        server.start()
        yield server
        server.stop()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A scheduler and two workers started by hand, sharing nothing but the network."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    with ExitStack() as stack:
        scheduler = ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port)]
        stack.enter_context(process_of_its_own(tmp_path / "scheduler", *scheduler, "--no-dashboard"))
        worker = ["-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny"]
        workers = [stack.enter_context(process_of_its_own(tmp_path / f"worker {i}", *worker)) for i in range(2)]
        wait_until(lambda: all(b"Registered to" in w.log.read_bytes() for w in workers), 60, "no worker started")
        yield SimpleNamespace(address=address, workers=workers)
