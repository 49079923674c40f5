"""Nothing that a learner wrote is lost: every command on every state of a file, and what can happen in between."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import learner_course as course
import pytest
from learner_course import ADDED, MINE, ONE, PROSE

from autograder.build import build_course, build_sources
from autograder.layout import write
from autograder.learner import check
from autograder.learner.check import check_work
from autograder.learner.lab import open_lab
from autograder.learner.merge import merge
from autograder.learner.submit import submit_work
from autograder.learner.work import Busy, Work

OWN = (MINE, ADDED, PROSE, "attachment:me.png", "iVBORw0KGgo=")  # all that a learner had written


def holds(path: Path) -> list[str]:
    """What of the learner's work is in a file, whatever its form."""
    data = path.read_bytes().decode("utf-8", "replace").replace("\\r\\n", "\\n")
    return [own for own in OWN if json.dumps(own, ensure_ascii=False)[1:-1] in data or own in "".join(_sources(data))]


def _sources(data: str) -> list[str]:
    try:
        return ["".join(cell["source"]) for cell in json.loads(data.removeprefix("\ufeff"))["cells"]]
    except (ValueError, KeyError, TypeError):
        return []


def everything(root: Path) -> list[Path]:
    """Every notebook below work/ and course/."""
    return [path for folder in ("work", "course") for path in (root / folder).rglob("*.ipynb")]


# --- states of the learner's copy -----------------------------------------------------------------------------


def as_it_is(path: Path) -> None:
    pass


def with_crlf(path: Path) -> None:
    notebook = course.read(path)
    for cell in notebook["cells"]:
        cell["source"] = [line.replace("\n", "\r\n") for line in "".join(cell["source"]).splitlines(keepends=True)]
    path.write_bytes(json.dumps(notebook, ensure_ascii=False, indent=1).replace("\n", "\r\n").encode())


def with_mark(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def from_colab(path: Path) -> None:
    """Without nbgrader's metadata, our ids and the seal."""
    notebook = course.read(path)
    notebook["metadata"] = {"colab": {}}
    for number, cell in enumerate(notebook["cells"]):
        cell["metadata"], cell["id"] = {}, f"x{number}"
    course.write(path, notebook)


def without_base(path: Path) -> None:
    shutil.rmtree(path.parents[1] / ".course")


def half(path: Path) -> None:
    """A notebook cut off behind the learner's work: no program reads it."""
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(PROSE.encode()) + len(PROSE.encode())])
    os.utime(path, (0, 0))  # long ago, so that nobody is writing it


def as_link(path: Path) -> None:
    """In another folder, a synchronized one say."""
    there = path.parents[2] / "elsewhere.ipynb"
    path.rename(there)
    path.symlink_to(there)


def with_strange_outputs(path: Path) -> None:
    notebook = course.read(path)
    course.find(notebook, "norm")["outputs"] = [{"output_type": "nonsense"}]
    course.write(path, notebook)


STATES = [as_it_is, with_crlf, with_mark, from_colab, without_base, half, as_link, with_strange_outputs]


# --- commands -------------------------------------------------------------------------------------------------


def lab(root: Path) -> None:
    course.lay(root)


def lab_twice(root: Path) -> None:
    course.lay(root)
    course.lay(root)


def check_all(root: Path) -> None:
    assert check_work(root=root) == 0


def submit(root: Path) -> None:
    assert submit_work("ada", root=root) in (0, 1, 2)


def build_all(root: Path) -> None:
    build_course(root=root)


def build_for_run(root: Path) -> None:
    build_sources([ONE], root=root)


COMMANDS = [lab, lab_twice, check_all, submit, build_all, build_for_run]


@pytest.mark.parametrize("lesson", ["the same", "changed"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_lost(project, changed, monkeypatch, command, state, lesson) -> None:
    monkeypatch.setattr(check, "run_checks", lambda *given: [])
    path = course.solve(project)
    state(path)
    before = path.read_bytes()
    had = holds(path)
    assert had == list(OWN) or (had and state is half)
    if lesson == "changed":
        course.change_lesson(project, changed)
    command(project)
    kept = [own for file in everything(project) for own in holds(file)]
    assert set(had) <= set(kept)
    after = path.read_bytes()
    updated = command in (lab, lab_twice) and (lesson == "changed" or state is from_colab) and state is not half
    if not updated:
        assert after == before
        return
    assert set(had) <= set(holds(path))
    assert before in [file.read_bytes() for file in (project / "work" / ".earlier").rglob("*.ipynb")]


@pytest.mark.parametrize("command", [build_all, build_for_run])
@pytest.mark.parametrize("state", ["answer", "added cell", "half a file", "its source gone"])
def test_a_notebook_in_course_that_holds_an_answer_is_not_rebuilt(project, capsys, command, state) -> None:
    path = project / "course" / f"{ONE}.ipynb"
    shutil.copy(course.solve(project), path)
    notebook = course.read(path)
    if state == "answer":
        notebook["cells"] = [cell for cell in notebook["cells"] if cell["id"] not in ("b7e1", "c9d2")]
        course.write(path, notebook)
    elif state == "half a file":
        half(path)
    elif state == "its source gone":
        (project / "solutions" / f"{ONE}.py").unlink()
        shutil.rmtree(project / "build")
        command = build_all
    before = path.read_bytes()
    command(project)
    assert path.read_bytes() == before
    told = [line for line in capsys.readouterr().err.split("\n") if "not rebuilt" in line]
    assert told == [
        f"course/{ONE}.ipynb: not rebuilt, for somebody has written in it: "
        f"move it to work/{ONE} (from course).ipynb (or delete it), and run this again"
    ]


def test_that_notebook_moved_to_work_goes_on_there(project, capsys) -> None:
    path = project / "course" / f"{ONE}.ipynb"
    copy = course.solve(project)
    copy.replace(path)
    assert build_course(root=project) == 1
    assert f"move it to work/{ONE}.ipynb (or" in capsys.readouterr().err
    path.replace(copy)
    assert build_course(root=project) == 0
    course.lay(project)
    assert set(holds(copy)) == set(OWN)


def test_answers_in_course_come_along_into_work(project, changed) -> None:
    """Laid from a notebook in course/ that somebody has written in, and merged after the next pull."""
    copy = course.solve(project)
    shutil.copy(copy, project / "course" / f"{ONE}.ipynb")
    copy.unlink()
    course.lay(project)
    assert set(holds(copy)) == set(OWN)
    course.lay(project)
    course.change_lesson(project, changed)
    course.lay(project)
    assert set(holds(copy)) == set(OWN)


def test_a_damaged_notebook_in_course_is_told_and_nothing_is_touched(project, capsys) -> None:
    copy = course.solve(project)
    before = copy.read_bytes()
    (project / "course" / f"{ONE}.ipynb").write_text("<<<<<<< HEAD", encoding="utf-8")
    assert check_work(root=project) == 2
    assert submit_work("ada", root=project) == 2
    assert open_lab(root=project) == 2
    assert copy.read_bytes() == before
    said = capsys.readouterr().err.splitlines()
    assert (
        said
        == [f"course/{ONE}.ipynb is damaged: keep what is yours of it, then: git checkout -- course/{ONE}.ipynb"] * 3
    )


def test_outputs_alone_do_not_keep_a_notebook_from_being_rebuilt(project) -> None:
    path = project / "course" / f"{ONE}.ipynb"
    fresh = path.read_bytes()
    notebook = course.read(path)
    course.find(notebook, "norm")["execution_count"] = 7
    course.write(path, notebook)
    assert build_course(root=project) == 0
    assert path.read_bytes() == fresh


def test_what_git_keeps_may_be_rebuilt(project) -> None:
    """A notebook of a builder that set no seals, as a clone has it."""
    path = project / "course" / f"{ONE}.ipynb"
    fresh = path.read_bytes()
    notebook = course.read(path)
    del notebook["metadata"]["llm40"]["seal"]
    course.write(path, notebook)
    assert build_course(root=project) == 1
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "course"], ["commit", "-q", "-m", "course"]):
        subprocess.run([*git, *command], cwd=project, check=True)
    assert build_course(root=project) == 0
    assert path.read_bytes() == fresh


# --- the merge ------------------------------------------------------------------------------------------------


def test_what_is_merged_and_what_is_told(project, changed) -> None:
    path = course.solve(project)
    course.answer(project, longest="return max(x)  # an answer to what is gone")
    notebook = course.read(path)
    prose = next(cell for cell in notebook["cells"] if "has a length" in course.text(cell))
    course.set_text(prose, course.text(prose) + " A note of mine.")
    course.write(path, notebook)
    course.change_lesson(project, changed)
    [line] = course.lay(project)
    earlier = next((project / "work" / ".earlier").rglob("*.ipynb"))
    assert line == (
        f"work/{ONE}.ipynb is up to date again: 2 answers and 3 cells of your own are kept; new: shortest; "
        "asks for something else: norm; no more asked for, your answer is a plain cell now: longest; "
        f"the course's again: 1 given cells that you had edited; as it was: {earlier.relative_to(project).as_posix()}"
    )
    merged = course.read(path)
    ours = course.read(project / "course" / f"{ONE}.ipynb")
    own = [cell for cell in merged["cells"] if cell["metadata"].get("llm40", {}).get("role") == "added"]
    assert [course.text(cell).split("\n")[-1] for cell in own] == [
        ADDED,
        "![](attachment:me.png)",
        "    return max(x)  # an answer to what is gone",
    ]
    assert "nbgrader" not in own[2]["metadata"]
    assert own[0]["outputs"][0]["text"] in ("an output of mine", ["an output of mine"])
    assert own[1]["attachments"] == {"me.png": {"image/png": "iVBORw0KGgo="}}
    rest = [cell["id"] for cell in merged["cells"] if cell not in own]
    assert rest == [cell["id"] for cell in ours["cells"]]
    for cell in merged["cells"]:
        if cell not in own and cell["id"] not in ("norm", "answer-why"):
            assert course.text(cell) == course.text(course.find(ours, cell["id"]))
    names = [cell["id"] for cell in merged["cells"]]
    assert names.index("norm") + 1 == names.index(own[0]["id"])
    assert course.lay(project) == []  # once


def test_what_was_added_to_a_given_cell_becomes_a_cell_of_the_learners(project) -> None:
    path = course.solve(project)
    notebook = course.read(path)
    given = next(cell for cell in notebook["cells"] if course.text(cell) == "import math")
    course.set_text(given, "import math\nimport statistics")
    course.write(path, notebook)
    merged, changes = merge(Work(project).read_course(course.ONE), path.read_bytes())
    texts = [cell.source for cell in merged.cells]
    assert texts[texts.index("import math") + 1] == "import statistics"
    assert changes.added == 3  # two stood there before


def test_an_untouched_copy_becomes_the_new_lesson(project, changed) -> None:
    course.change_lesson(project, changed)
    [line] = course.lay(project)
    assert "0 answers and 0 cells" in line
    path = project / "work" / f"{ONE}.ipynb"
    assert course.texts(path) == course.texts(changed / "course" / f"{ONE}.ipynb")


def test_there_and_back_again(project, changed, editions) -> None:
    """Through four editions the work stays, and each earlier file is kept."""
    path = course.solve(project)
    for edition in (changed, editions[0], changed, editions[0]):
        course.change_lesson(project, edition)
        course.lay(project)
        assert set(holds(path)) == set(OWN)
    assert len([cell for cell in course.read(path)["cells"] if course.text(cell) == ADDED]) == 1


def test_an_answer_stays_also_where_nothing_is_known_of_the_copy(project, changed) -> None:
    path = course.solve(project)
    from_colab(path)
    without_base(path)
    course.change_lesson(project, changed)
    course.lay(project)
    assert MINE in course.text(course.find(course.read(path), "norm"))
    assert set(holds(path)) == set(OWN)


def test_a_copy_that_cannot_be_read_is_told(project, changed) -> None:
    path = course.solve(project)
    half(path)
    course.change_lesson(project, changed)
    [line] = course.lay(project)
    assert line.startswith(f"work/{ONE}.ipynb: left as it is: the file is not a notebook: not valid JSON")


def test_notes_on_the_roadmap_are_kept_beside_it(project) -> None:
    page = project / "work" / "index.ipynb"
    notebook = course.read(page)
    course.set_text(notebook["cells"][0], "my plan")
    course.write(page, notebook)
    course.lay(project)
    assert "my plan" not in course.texts(page)
    [earlier] = (project / "work" / ".earlier").glob("index.*.ipynb")
    assert "my plan" in course.texts(earlier)


def test_a_copy_that_was_deleted_is_laid_again(project) -> None:
    path = course.solve(project)
    path.unlink()
    assert course.lay(project) == []
    assert path.read_bytes() == (project / "course" / f"{ONE}.ipynb").read_bytes()


# --- what can happen in between -------------------------------------------------------------------------------


def test_a_save_in_jupyterlab_at_the_worst_moment(project, changed, monkeypatch) -> None:
    """The learner saves while the merge is under way: what they saved is merged too."""
    path = course.solve(project)
    course.change_lesson(project, changed)
    keep = Work.keep_earlier
    saved = []

    def save_then_keep(self, key, data):
        if not saved:
            notebook = course.read(path)
            saved.append("a line written while the merge ran")
            notebook["cells"].append({"cell_type": "markdown", "id": "late", "metadata": {}, "source": saved[0]})
            course.write(path, notebook)
        return keep(self, key, data)

    monkeypatch.setattr(Work, "keep_earlier", save_then_keep)
    course.lay(project)
    assert saved[0] in course.texts(path)
    assert set(holds(path)) == set(OWN)


def _save_in_place(path: str, begun, data: bytes) -> None:
    """As JupyterLab does: the file is emptied, and then written."""
    with open(path, "wb") as file:
        begun.set()
        time.sleep(0.5)
        file.write(data)


@pytest.mark.parametrize("lesson", ["the same", "changed"])
def test_a_file_that_is_being_saved_is_awaited(project, changed, monkeypatch, lesson) -> None:
    monkeypatch.setattr(check, "run_checks", lambda *given: [])
    path = course.solve(project)
    if lesson == "changed":
        course.change_lesson(project, changed)
    context = multiprocessing.get_context("fork")
    for command in (lab, check_all, submit):
        begun = context.Event()
        process = context.Process(target=_save_in_place, args=(str(path), begun, path.read_bytes()))
        process.start()
        begun.wait(10)
        command(project)
        process.join(10)
        assert set(holds(path)) == set(OWN)


def test_a_save_into_the_file_that_was_just_replaced(project, changed, monkeypatch) -> None:
    """JupyterLab opened the file before the merge was put in its place, and writes after that."""
    path = course.solve(project)
    course.change_lesson(project, changed)
    window = course.read(path)
    window["cells"].append({"cell_type": "markdown", "id": "late", "metadata": {}, "source": "written late"})
    files = []
    put = Work._write_with_base

    def open_put_write(self, key, text, lesson):
        if key == ONE and not files:
            files.append(open(path, "r+b"))  # noqa: SIM115
        put(self, key, text, lesson)
        if files and not files[0].closed:
            files[0].write(json.dumps(window, ensure_ascii=False).encode())
            files[0].truncate()
            files[0].close()

    monkeypatch.setattr(Work, "_write_with_base", open_put_write)
    course.lay(project)
    assert "written late" in course.texts(path)
    assert set(holds(path)) == set(OWN)
    assert "The least." in "".join(course.texts(path))
    assert not list(path.parent.glob(".*.old"))


def test_a_save_from_a_window_that_was_open_before(project, changed) -> None:
    """JupyterLab asks, and the learner says Overwrite: the older lesson is merged again."""
    path = course.solve(project)
    window = course.read(path)
    course.change_lesson(project, changed)
    course.lay(project)
    window["cells"].append({"cell_type": "markdown", "id": "late", "metadata": {}, "source": "typed after that"})
    course.write(path, window)
    [line] = course.lay(project)
    assert "is up to date again" in line
    assert "typed after that" in course.texts(path)
    assert set(holds(path)) == set(OWN)
    assert any("The Euclidean length" in source for source in course.texts(changed / "course" / f"{ONE}.ipynb"))


def _lay_often(root: str, changed: str) -> None:
    for _ in range(5):
        course.lay(Path(root))


def test_two_commands_at_once(project, changed) -> None:
    path = course.solve(project)
    course.change_lesson(project, changed)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_lay_often, args=(str(project), str(changed))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert set(holds(path)) == set(OWN)
    assert len(list((project / "work" / ".earlier").rglob("*.ipynb"))) == 1


def test_a_command_that_waits_in_vain_says_for_what(project, monkeypatch, capsys) -> None:
    monkeypatch.setattr(check, "run_checks", lambda *given: [])
    course.solve(project)
    with Work(project).lock():
        with pytest.raises(Busy, match=r"another command .* for 0\.2 s"), Work(project).lock(0.2):
            pass
        monkeypatch.setattr(Work.lock.__wrapped__, "__defaults__", (0.1,))
        assert submit_work("ada", root=project) == 2
    assert "another command has been writing" in capsys.readouterr().err


@pytest.mark.parametrize("moment", range(6))
def test_killed_in_the_middle(project, changed, moment) -> None:
    """SIGKILL at each write of an update: before it, half-way, and between two of them."""
    path = course.solve(project)
    before = path.read_bytes()
    course.change_lesson(project, changed)
    child = os.fork()
    if child == 0:
        left = [moment]

        def die(file: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = die
        try:
            course.lay(project)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    now = path.read_bytes()
    assert now == before or "The least." in "".join(course.texts(path))  # the old one or the new one, whole
    assert set(holds(path)) == set(OWN)
    course.lay(project)  # the lock is free, and the work is done
    assert set(holds(path)) == set(OWN)
    assert "The least." in "".join(course.texts(path))
    assert before in [file.read_bytes() for file in (project / "work" / ".earlier").rglob("*.ipynb")]


@pytest.mark.parametrize("moment", range(4))
def test_full_disk(project, changed, monkeypatch, moment) -> None:
    path = course.solve(project)
    before = path.read_bytes()
    course.change_lesson(project, changed)
    left = [moment]

    def fill(file: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fill)
        work = Work(project)
        with work.lock():
            lines = work.make_current(work.list_lessons())
    assert set(holds(path)) == set(OWN)
    if moment < 2:
        assert path.read_bytes() == before
        assert lines == [f"work/{ONE}.ipynb: left as it is: No space left on device"]
    assert not [file for file in (project / "work").rglob("*") if f".{os.getpid()}" in file.name]
    course.lay(project)
    assert set(holds(path)) == set(OWN)
    assert "The least." in "".join(course.texts(path))


def test_a_disk_that_is_full_in_earnest(project, changed, tmp_path) -> None:
    """work/ on a file system of 512 kB."""
    small = tmp_path / "small"
    small.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(small)]
    if os.name != "posix" or subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("no file system of its own can be mounted here")
    try:
        path = course.solve(project)
        shutil.copytree(project / "work", small / "work")
        shutil.rmtree(project / "work")
        (project / "work").symlink_to(small / "work")
        (small / "filler").write_bytes(b"x" * (shutil.disk_usage(small).free - 4096))
        before = path.read_bytes()
        course.change_lesson(project, changed)
        work = Work(project)
        with work.lock():
            lines = work.make_current(work.list_lessons())
        assert lines == [f"work/{ONE}.ipynb: left as it is: No space left on device"]
        assert path.read_bytes() == before
        (small / "last").write_bytes(b"x" * shutil.disk_usage(small).free)
        assert submit_work("ada", root=project) == 1
        assert check_work(root=project, kernels=course.KERNELS) == 0
        assert path.read_bytes() == before
        (small / "filler").unlink()
        (small / "last").unlink()
        course.lay(project)
        assert set(holds(path)) == set(OWN)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(project, changed) -> None:
    path = course.solve(project)
    course.change_lesson(project, changed)
    path.parent.chmod(0o500)
    try:
        assert course.lay(project) == [f"work/{ONE}.ipynb: left as it is: Permission denied"]
    finally:
        path.parent.chmod(0o700)


def test_write_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    write(path, "one")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write(path, "two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
