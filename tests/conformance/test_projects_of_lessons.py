"""What lessons build is accepted as the project that starts from them: the kernels of 29, the engine of 34."""

import multiprocessing
from pathlib import Path

import pytest

from llm40 import projects

ATTENTION = """
def attention(q, k, v, causal):
    return lesson.FlashAttention.apply(q, k, v, causal)
"""
ENGINE = """
import uvicorn

from llm40 import models


def serve(host, port):
    model, tokenizer = models.load("tiny", device="cpu")
    engine = lesson.Engine(model, lesson.Scheduler(lesson.Blocks(200, 8, lesson.RadixCache()), 256, 32))
    app = lesson.make_app(engine, lesson.Texts(tokenizer), "tiny")
    listed = {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "llm40"}]}
    app.add_api_route("/v1/models", lambda: listed)
    uvicorn.run(app, host=host, port=port, log_level="error")
"""
READ = f"""
import importlib.util

spec = importlib.util.spec_from_file_location("references", {str(Path(__file__).parent / "conftest.py")!r})
references = importlib.util.module_from_spec(spec)
spec.loader.exec_module(references)
lesson = references._reference(NUMBER)
"""


@pytest.mark.parametrize(
    ("number", "lesson", "text"), [(2, "29", ATTENTION), (8, "34", ENGINE)], ids=["attention", "engine"]
)
def test_a_lesson_is_accepted_as_a_project(reference, tmp_path, number, lesson, text):
    reference(lesson)  # here first: what it says of itself, if it does not run
    project = projects.PROJECTS[number - 1]
    path = tmp_path / "李雷 projects" / project.file
    path.parent.mkdir()
    path.write_text(READ.replace("NUMBER", repr(lesson)) + text, encoding="utf-8")
    said = []
    assert projects.accept(project, path, said.append), "\n".join(said)
    assert not multiprocessing.active_children()
