"""The class that the grading benchmark generates, and how the benchmark reads what it measured."""

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import tiny

from autograder.grading.masters import make_sent_master
from autograder.grading.rebuild import read_submission, rebuild
from benchmarks import grading
from benchmarks.grading_class import SHARES, make_class, students
from benchmarks.grading_run import MIB, ROLES, Run, memory_of

ENTRY = SimpleNamespace(key=f"{tiny.STAGE}/{tiny.LESSON}")
RIGHT, WRONG = "def double(x):\n    return x + x", "def double(x):\n    return x + 2"
ANSWERS = f'# %% wrong="double" because="adds two"\n{WRONG}\n\n# %% right="double" because="a sum"\n{RIGHT}\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with the tiny lesson, at a path that is none too easy."""
    root = tmp_path / "课程 with spaces"
    tiny.build(root / "build")
    for folder, ending, text in (
        ("build/release", "ipynb", nbformat.writes(tiny.stub())),
        ("tests/answers", "py", ANSWERS),
    ):
        path = root / folder / f"{ENTRY.key}.{ending}"
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    return root


def made(root: Path, folder: str, count: int, seed: int = 1) -> dict[str, bytes]:
    return {path.parts[-3]: path.read_bytes() for path in make_class(root / folder, [ENTRY], count, seed, root)}


def test_a_class_is_the_same_again_and_a_smaller_one_is_its_beginning(root):
    forty = made(root, "one", 40)
    assert made(root, "other", 40) == forty
    assert made(root, "other", 10) == {who: data for who, data in forty.items() if who in students(10)}
    assert made(root, "other", 40, seed=2) != forty


def test_every_notebook_is_one_that_the_grader_takes_without_a_remark(root):
    for data in made(root, "class", 20).values():
        nbformat.validate(json.loads(data))
        cells, flags = read_submission(data)
        assert (flags, rebuild(make_sent_master(tiny.master()), cells)[1]) == ([], [])


def test_every_kind_of_answer_is_there_about_as_often_as_it_should(root):
    count = 200
    texts = {RIGHT: "right", WRONG: "wrong", tiny.stub().cells[tiny.find(tiny.stub(), "double")].source: "stub"}
    notebooks = [nbformat.reads(data.decode(), as_version=4) for data in made(root, "class", count).values()]
    sources = [notebook.cells[tiny.find(notebook, "double")].source.strip() for notebook in notebooks]
    found = Counter(texts.get(source, "reference") for source in sources)
    for kind, share in SHARES.items():
        assert found[kind] / len(sources) == pytest.approx(share, abs=0.1)
    assert 0.9 < len(notebooks) / count < 1  # some are not handed in
    assert len(list((root / "class").iterdir())) == count  # and their folders are there all the same


def test_students_have_different_names_partly_chinese():
    names = students(250)
    assert len(set(names)) == 250
    assert 100 < sum(name.isascii() for name in names) < 150


def record(**changes) -> dict:
    check = {"check": "double-check-1", "points": 2, "score": 2, "status": "passed", "message": ""}
    return {"status": "graded", "score": 2, "flags": [], "checks": [check | changes]}


def test_a_verdict_that_differs_is_told():
    assert grading.differing(record(), record()) == []
    [line] = grading.differing(record(message="by 0.1"), record(message="by 0.2"))
    assert "double-check-1" in line
    assert "by 0.1" in line
    assert len(grading.differing(record(), record() | {"checks": [], "score": 0})) == 2


def test_another_message_is_no_other_score():
    assert grading.scores_of(record(message="by 0.1")) == grading.scores_of(record(message="by 0.2"))
    assert grading.scores_of(record()) != grading.scores_of(record() | {"checks": []})
    assert grading.scores_of(record()) != grading.scores_of(record() | {"status": "withheld"})


@pytest.mark.parametrize("step", [0, 10])
def test_memory_that_grows_is_seen(step):
    records = [{"at": float(at)} for at in range(100)]
    memory = [(at + 0.5, {role: (100 + step * at * (role == ROLES[0])) * MIB for role in ROLES}) for at in range(99)]
    found = grading.quarters(Run(100.0, records, memory))
    assert found["slope_per_100_notebooks"] == pytest.approx(100 * step)
    assert (found["growth"] > grading.FLAT) == bool(step)
    assert found["last"][ROLES[1]] == 100


def test_a_process_has_memory():
    assert memory_of(os.getpid())[ROLES[0]] > 10 * MIB
