"""What learners write costs bounded time and memory to read, to color and to compare; none of their code runs here."""

import json
import random
import threading
import time

import nbformat
import pytest
import tiny

from autograder.execute import Limits
from autograder.grading import clerk, similarity
from autograder.grading.clerk import Clerk, TooMuch
from autograder.grading.grade import grade_folder
from autograder.grading.masters import make_sent_master
from autograder.grading.rebuild import Unreadable, read_name, read_role, rebuild
from autograder.grading.task import grade_task


def notebook_of(*sources: str, kind: str = "code") -> bytes:
    """Cells without nbgrader's metadata."""
    cells = [{"cell_type": kind, "metadata": {}, "source": source, "id": f"z{i}"} for i, source in enumerate(sources)]
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}).encode()


def shuffled(number: int) -> list[str]:
    """The letters of our checks in another order: as like to them, letter for letter, as can be."""
    rng = random.Random(1)
    checks = [cell.source for cell in tiny.stub().cells if read_role(cell) == "check"]
    return ["".join(rng.sample(text, len(text))) for text in checks * (number // len(checks))]


# --- notebooks ------------------------------------------------------------------------------------------------

TOO_LARGE = {
    "a cell of 400,000 lines": (lambda: notebook_of("x\n" * 400_000), "400,001 lines of code"),
    "many cells": (lambda: notebook_of(*["x = 1"] * 30_000), "30,000 cells"),
    "a cell of 12 MB": (lambda: notebook_of("x = 1\n" * 2_000_000), "12,000,000 characters of code"),
    "a long text": (lambda: notebook_of("x" * 30_000_000, kind="markdown"), "30,000,000 characters, more"),
    "lists beside lists": (lambda: b'{"nbformat": 4, "cells": [' + b"[]," * 10**6 + b"[]]}", "1,000,001 cells"),
    "lists in lists": (lambda: b'{"nbformat": 4, "cells": ' + b"[" * 10**6, "nested too deeply"),
    "old, and deep": (lambda: b'{"nbformat": 3, "x": ' + b"[" * 900 + b"]" * 900 + b"}", "cannot be converted"),
}


@pytest.mark.parametrize(("data", "words"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_notebook_that_is_too_large(data, words):
    with pytest.raises(Unreadable, match=words):
        clerk.read_submission_safely(data())


@pytest.mark.parametrize("number", [300, 1500])
def test_cells_that_are_like_ours_to_the_letter(number):
    """Without metadata each is compared with each of ours: a second of work at most, not 0.04 s for each pair."""
    answered = tiny.stripped(tiny.answered())
    crowd = [nbformat.v4.new_code_cell(source) for source in shuffled(number)]
    answered.cells[3:3] = crowd
    cells, _ = clerk.read_submission_safely(tiny.dumps(answered))
    began = time.process_time()
    notebook, flags = rebuild(make_sent_master(tiny.master()), cells)
    assert time.process_time() - began < 2
    ours = [read_name(cell) for cell in notebook.cells if read_role(cell) != "added"]
    assert ours == [read_name(cell) for cell in tiny.master().cells]
    assert [flag for flag in flags if "edited" in flag or "deleted" in flag] == []
    assert len(notebook.cells) == len(ours) + len(crowd)


def test_a_copy_of_ours_is_known_though_it_was_edited():
    """Without metadata, by most of its words; the nearest, where checks are like each other."""
    answered = tiny.stripped(tiny.answered())
    cell = answered.cells[tiny.find(tiny.answered(), "double-check-1")]
    cell.source = cell.source.replace("must be", "should be")
    flags = rebuild(make_sent_master(tiny.master()), clerk.read_submission_safely(tiny.dumps(answered))[0])[1]
    assert "double-check-1: edited; the course's was used" in flags


# --- the clerk ------------------------------------------------------------------------------------------------


def test_a_task_that_takes_too_long_is_stopped_and_the_next_is_done():
    quick = Clerk(seconds=1)
    try:
        with pytest.raises(TooMuch):
            quick.do("color", "x = [1, 'a', b]\n" * 100_000)
        assert "span" in quick.do("color", "x = 1")
    finally:
        quick.close()


def test_a_task_that_takes_too_much_memory_is_given_up():
    small = Clerk(memory=200 * 10**6)
    try:
        with pytest.raises(TooMuch):
            small.do("read", b'{"nbformat": 4, "cells": [' + b'{"":0},' * 10**6 + b"[]]}")
        assert "span" in small.do("color", "x = 1")
    finally:
        small.close()


def test_it_ends_with_the_grader():
    """Its input closes, whatever ended the grader."""
    ours = Clerk()
    ours.do("color", "")
    process = ours.process
    process.stdin.close()
    assert process.wait(10) == 0
    process.stdout.close()


def test_many_threads_ask_it():
    told = []
    asking = [threading.Thread(target=lambda n=n: told.append((n, clerk.color_safely(f"x{n}")))) for n in range(20)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert all(f"x{n}<" in html for n, html in told)
    assert len(told) == 20


def test_code_that_cannot_be_colored_is_shown_without_colors(monkeypatch):
    quick = Clerk(seconds=1)
    monkeypatch.setattr(clerk, "CLERK", quick)
    assert clerk.color_safely("x = [1, 'a', b]\n" * 100_000) is None
    quick.close()


def test_one_long_answer_is_not_compared_and_the_others_are():
    answers = {"ann": tiny.SUM * 20, "bob": tiny.SUM * 20, "mallory": "x = [1]\n" * 20_000}
    left_out = []
    pairs = similarity.find_alike("99", answers, "pass", left_out.append)
    assert [(pair.first, pair.second) for pair in pairs] == [("ann", "bob")]
    assert left_out == ["mallory"]


# --- a class --------------------------------------------------------------------------------------------------


def test_a_class_with_all_of_them(tmp_path):
    """Each costs its own line; ada has her points, and the class its time."""
    sparse = tiny.hand_in(tmp_path / "in", "mallory", b"")
    with open(sparse, "wb") as file:
        file.truncate(6 * 10**9)
    for label, (data, _) in TOO_LARGE.items():
        tiny.hand_in(tmp_path / "in", label, data())
    tiny.hand_in(tmp_path / "in", "shuffled", notebook_of(*shuffled(300)))
    tiny.hand_in(tmp_path / "in", "ada", tiny.dumps(tiny.answered()))
    results = grade_folder(
        tmp_path / "in",
        tmp_path / "out",
        tiny.build(tmp_path),
        limits=Limits(cell=5, notebook=60),
        compare=True,
        engine=lambda tasks, jobs: map(grade_task, tasks),
        show=lambda line: None,
        kernels=tiny.KERNELS,
    )
    status = {result.student: (result.status, result.score) for result in results}
    assert status.pop("ada") == ("graded", 8)
    assert status.pop("shuffled") == ("graded", 0)
    assert set(status.values()) == {("unreadable", 0)}
    assert (tmp_path / "out" / "feedback" / "mallory").is_dir()
