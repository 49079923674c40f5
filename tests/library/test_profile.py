"""The profile decides before anything is imported, so each case is a process of its own."""

import os
import subprocess
import sys

import pytest


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in ("LLM40_PROFILE", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


def test_a_cpu_interprets_triton_in_float32():
    done = python(
        "import os; from llm40 import profile as p; import triton\n"
        "print(p.name, p.device, p.dtype, p.interpret, os.environ['TRITON_INTERPRET'], p.pick(cpu=1, gpu=2))",
        LLM40_PROFILE="cpu",
    )
    assert done.stdout.split() == ["cpu", "cpu", "torch.float32", "True", "1", "1"], done.stderr


def test_an_unknown_profile_is_an_error():
    done = python("import llm40", LLM40_PROFILE="tpu")
    assert "LLM40_PROFILE is 'tpu': it can be cpu, gpu or auto" in done.stderr


def test_a_gpu_that_is_not_there_is_an_error():
    done = python("import llm40", LLM40_PROFILE="gpu", CUDA_VISIBLE_DEVICES="")
    assert "PyTorch sees no CUDA device" in done.stderr


def test_triton_imported_too_early_is_an_error():
    pytest.importorskip("triton")
    done = python("import triton, llm40", LLM40_PROFILE="cpu")
    assert "triton was imported before llm40" in done.stderr
    assert "restart the kernel" in done.stderr


def test_the_library_is_quick_to_import_beyond_torch():
    """Measured against torch's own import in the same process; generous, for a busy machine."""
    done = python(
        "import time, torch, numpy\nstart = time.perf_counter()\nfrom llm40 import checks, profile\n"
        "print(time.perf_counter() - start)",
        LLM40_PROFILE="cpu",
    )
    assert float(done.stdout) < 1.0, done.stderr
