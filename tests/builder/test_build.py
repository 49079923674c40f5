"""solutions → build/source and course/."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbgrader.nbgraderformat import MetadataValidator
from tiny_course import KEY, Project

from autograder import build
from autograder.build import STATE, build_course
from autograder.layout import ROOT
from autograder.leaks import find_leaks
from autograder.lesson import STUB, read_lesson


@pytest.fixture
def built(project: Project) -> Project:
    assert build_course(root=project.root) == 0
    return project


def cells(path: Path) -> dict[str, dict]:
    return {cell["id"]: cell for cell in nbformat.read(path, as_version=4).cells}


def test_learners_notebook(built: Project) -> None:
    made = cells(built.learners)
    assert made["norm"].source == (
        "# Exercise 1 (norm) · ●●○ · 5 min · core\n"
        'def norm(x):\n    """The length of a list of numbers."""\n    ' + STUB
    )
    assert made["norm"].metadata["deletable"] is False
    assert made["norm"].metadata.get("editable", True) is True
    check = made["norm-check-1"]
    assert check.source.startswith("# Check 1a (norm) · 2 points\nassert norm([3, 4]) == 5")
    assert (check.metadata["editable"], check.metadata["deletable"]) == (False, False)
    assert made["norm-check-2"].source.startswith("# Check 1b (norm) · 1 point\n")
    assert made["answer-why-root"].source == "YOUR ANSWER HERE"
    experiment = next(cell for name, cell in made.items() if name.startswith("experiment-"))
    assert experiment.metadata["tags"] == ["experiment"]
    assert all(not cell.get("outputs") for cell in made.values())
    text = built.learners.read_text(encoding="utf-8")
    for secret in ("sum_of_squares", "for dimension in", "independent coordinates", "BEGIN", "END "):
        assert secret not in text


def test_master_keeps_answers_and_hidden_tests(built: Project) -> None:
    text = built.master.read_text(encoding="utf-8")
    for secret in ("sum_of_squares", "for dimension in", "independent coordinates", "### BEGIN HIDDEN TESTS"):
        assert secret in text


@pytest.mark.parametrize("edition", ["master", "learners"])
def test_metadata_is_nbgraders_schema_3(built: Project, edition: str) -> None:
    notebook = nbformat.read(getattr(built, edition), as_version=4)
    nbformat.validate(notebook)
    MetadataValidator().validate_nb(notebook)
    marks = {c.id: c.metadata.nbgrader for c in notebook.cells if "nbgrader" in c.metadata}
    assert {name: (m.grade_id, m.grade, m.solution, m.locked, m.get("points")) for name, m in marks.items()} == {
        "norm": ("norm", False, True, False, None),
        "norm-check-1": ("norm-check-1", True, False, True, 2),
        "norm-check-2": ("norm-check-2", True, False, True, 1),
    }
    assert all(m.schema_version == 3 for m in marks.values())


def test_opening_table(built: Project) -> None:
    opening = cells(built.learners)["opening"].source
    for part in (
        "# 01 · Geometry of high-dimensional space",
        "高维空间的数学直觉",
        "Lengths of vectors.",
        "| Time | 10 min: reading, and 1 exercise |",
        "3, from 2 checks",
        "- [1. Core ideas](#section-1) · exercise 1\n- [2. Key questions](#section-2)\n- [3. References](#section-3)",
    ):
        assert part in opening


def test_time_of_two_paths(project: Project) -> None:
    """Reading is 200 words a minute; a section whose exercises are all `more` is off the core path."""
    project.replace("# A vector has", "# word\n" * 1000 + "# A vector has")
    project.replace(
        "# ## Key questions",
        """# ## More of it
"""
        + "# word\n" * 1500
        + '''

# %% exercise="double" minutes=20 difficulty=1 path="more"
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    return x + x
    ### END SOLUTION

# %% [markdown]
# <details><summary>Hint</summary>x + x</details>

# %% check="double" points=1
### BEGIN HIDDEN TESTS
assert double(2) == 4
### END HIDDEN TESTS

# %% [markdown]
# ## Key questions''',
    )
    assert read_lesson(project.source).minutes == (15, 40)
    assert build_course(root=project.root) == 0
    made = cells(project.learners)
    opening = made["opening"].source
    assert "| Time | 15 min for the core, 40 min for all: reading, and 2 exercises, 1 of them core |" in opening
    assert "- [2. More of it](#section-2) · exercise 2 (more)" in opening
    assert made["double"].source.startswith("# Exercise 2 (double) · ●○○ · 20 min · more\n")
    assert made["double-check-1"].source == "# Check 2 (double) · 1 point"
    notebook = nbformat.read(project.learners, as_version=4)
    assert notebook.metadata.llm40.minutes == {"core": 15, "whole": 40}
    index = (project.root / "course" / "index.ipynb").read_text(encoding="utf-8")
    assert "| 15 min | 40 min |" in index


def test_folded_cells(project: Project) -> None:
    """JupyterLab shows the first line of a hidden input: checks, support cells and figures begin with their title."""
    project.replace(
        "# %%\nimport math",
        '# %%\nimport math\n\n# %% tags=["support"]\n# Support: ones\ndef ones(n):\n    return [1.0] * n',
    )
    project.replace('# %% tags=["experiment"]\n', '# %% tags=["experiment", "figure"]\n# Figure: lengths\n')
    assert build_course(root=project.root) == 0
    folded = {
        name: cell
        for name, cell in cells(project.learners).items()
        if cell.metadata.get("jupyter", {}).get("source_hidden")
    }
    assert [cell.source.split("\n")[0] for cell in folded.values()] == [
        "# Setup: is the course's library here?",
        "# Support: ones",
        "# Check 1a (norm) · 2 points",
        "# Check 1b (norm) · 1 point",
        "# Figure: lengths",
    ]
    assert [cell.metadata.get("tags") for cell in folded.values()] == [
        None,
        ["support"],
        None,
        None,
        ["experiment", "figure"],
    ]


def test_numbers_and_links(project: Project) -> None:
    headings = "# ## Core ideas {#ideas}\n# ```\n# ## no heading\n# ```\n# ### Exercise · Lengths\n"
    project.replace("# ## Core ideas\n", headings)
    project.replace("# Because the", "# So.\n# See [](#norm) in\n# [](#ideas). [](#ideas) says: because the")
    assert build_course(root=project.root) == 0
    text = next(cell.source for cell in cells(project.learners).values() if "a **length**" in cell.source)
    assert text.startswith('## <a id="ideas"></a>1. Core ideas\n```\n## no heading\n```\n### Exercise 1 · Lengths\n')
    answer = cells(project.master)["answer-why-root"].source
    assert "See exercise 1 in\n[section 1](#ideas). [Section 1](#ideas) says" in answer
    references = list(cells(project.learners).values())[-1].source
    assert references.startswith('## <a id="section-3"></a>3. References\n')
    assert "[arXiv:1706.03762](https://arxiv.org/abs/1706.03762)" in references


def test_rebuilding_changes_no_byte(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built.files()
    shutil.rmtree(built.root / "build")
    assert build_course(root=built.root) == 0
    assert built.files() == first
    # and where nothing changed, nothing is built at all
    monkeypatch.setattr(build, "generate", lambda masters: pytest.fail("an unchanged lesson was built again"))
    assert build_course(root=built.root) == 0
    assert built.files() == first


def test_windows_line_ends_give_the_same_course(built: Project) -> None:
    first = built.learners.read_bytes()
    built.source.write_bytes(built.source.read_bytes().replace(b"\n", b"\r\n"))
    assert build_course(root=built.root) == 0
    assert built.learners.read_bytes() == first
    built.learners.write_bytes(first.replace(b"\n", b"\r\n"))  # as git on Windows may check it out
    assert build_course(root=built.root, check=True) == 0


def test_only_changed_lessons_are_built(built: Project) -> None:
    other = built.source.with_name("02_automatic_differentiation.py")
    other.write_text(built.text, encoding="utf-8")
    entries = built.layout.list_written()
    assert [e.number for e in build.build_lessons(entries, built.layout)] == [2]
    built.replace("math.sqrt(sum", "math.sqrt(0 + sum")
    assert [e.number for e in build.build_lessons(entries, built.layout)] == [1]
    assert build.build_lessons(entries, built.layout) == []
    assert "[01 Geometry of high-dimensional space](../stage1_foundations/01_high" in (
        built.root / "build" / "release" / "stage1_foundations" / "02_automatic_differentiation.ipynb"
    ).read_text(encoding="utf-8")


def test_one_cells_change_changes_one_id_at_most(built: Project) -> None:
    before = list(cells(built.learners))
    built.replace("import math", "import math  # for the root")
    assert build_course(root=built.root) == 0
    after = list(cells(built.learners))
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_removed_lesson_disappears(built: Project) -> None:
    mine = built.learners.with_name("my notes.ipynb")
    mine.write_text("{}", encoding="utf-8")
    built.source.unlink()
    assert build_course(root=built.root) == 0
    assert not built.learners.exists()
    assert not built.master.exists()
    assert mine.exists()


def test_check_names_what_differs_and_changes_nothing(built: Project, capsys: pytest.CaptureFixture) -> None:
    assert build_course(root=built.root, check=True) == 0
    built.replace("a **length**", "one **length**")
    before = built.learners.read_bytes()
    assert build_course(root=built.root, check=True) == 1
    assert f"course/{KEY}.ipynb: differs from its source" in capsys.readouterr().err
    assert built.learners.read_bytes() == before
    built.learners.unlink()
    assert build_course(root=built.root, check=True) == 1
    assert f"course/{KEY}.ipynb: is missing" in capsys.readouterr().err
    assert not built.learners.exists()
    built.source.unlink()
    built.learners.write_bytes(before)
    assert build_course(root=built.root, check=True) == 1
    assert f"course/{KEY}.ipynb: has no source any more" in capsys.readouterr().err


def test_broken_lesson_stops_with_its_lines(built: Project, capsys: pytest.CaptureFixture) -> None:
    before = built.files()
    built.replace("points=2", "points=0")
    assert build_course(root=built.root) == 1
    assert f'solutions/{KEY}.py:36: cell check "norm": `points` is 0' in capsys.readouterr().err
    assert built.files() == before


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("# A vector has a **length**.", "answer"),
        ("# **Why √d?** Write your answer below.", "answer"),
    ],
)
def test_an_answer_told_elsewhere_is_found(project: Project, capsys, where: str, told: str) -> None:
    project.replace(where, where + "\n#\n# sum_of_squares = sum(v * v for v in x)\n# return math.sqrt(sum_of_squares)")
    assert build_course(root=project.root) == 1
    assert f'cell exercise "norm": its {told} can be read elsewhere' in capsys.readouterr().err
    assert not project.learners.exists()


def test_a_hidden_test_told_elsewhere_is_found(project: Project) -> None:
    assert build_course(root=project.root) == 0
    read = read_lesson(project.source)
    master = project.master.read_text(encoding="utf-8")
    problems = find_leaks(read, master)  # as if nbgrader had cleared nothing
    for told in ("its hidden tests can be read", "its answer can be read", "`BEGIN SOLUTION` is left"):
        assert any(told in problem for problem in problems)


def test_stranger_in_solutions(project: Project, capsys: pytest.CaptureFixture) -> None:
    project.source.with_name("helpers.py").write_text("", encoding="utf-8")
    assert build_course(root=project.root) == 2
    assert "solutions/stage1_foundations/helpers.py: no such lesson" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lesson", "message"),
    [
        ("41", 'there is no lesson "41". There are:'),
        ("09", "solutions/stage2_transformer/09_attention_mha_mqa_gqa.py is not written yet"),
    ],
)
def test_wrong_usage(project: Project, capsys: pytest.CaptureFixture, lesson: str, message: str) -> None:
    assert build_course(lesson=lesson, root=project.root) == 2
    assert message in capsys.readouterr().err


def test_readme_tells_how_many_lessons_are_written(project: Project, capsys: pytest.CaptureFixture) -> None:
    readme = project.root / "README.md"
    readme.write_text("# LLM40\n\nSo far **12 of 40 lessons are written**.\n", encoding="utf-8")
    assert build_course(root=project.root, check=True) == 1
    assert "README.md: differs from its source; run make course" in capsys.readouterr().err
    assert build_course(root=project.root) == 0
    assert readme.read_text(encoding="utf-8") == "# LLM40\n\nSo far **1 of 40 lessons are written**.\n"
    assert STATE.search((ROOT / "README.md").read_text(encoding="utf-8"))


def test_verbose_tells_every_step(project: Project) -> None:
    program = (
        "import pathlib, sys; from autograder import build, logs\n"
        "logs.show_logs(sys.argv[1] == 'True'); sys.exit(build.build_course(root=pathlib.Path(sys.argv[2])))"
    )
    for verbose, told in ((True, f"autograder.build: {KEY}: read, 10 cells, 0 rules broken"), (False, "")):
        command = [sys.executable, "-c", program, str(verbose), str(project.root)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert told in done.stderr
        assert bool(done.stderr) == verbose


def test_learners_edition_is_left_alone(built: Project, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(built.root / "solutions")
    assert build_course(root=built.root) == 2
    assert "this is the learners' edition" in capsys.readouterr().err
    assert built.learners.exists()


def test_nbgraders_own_command_makes_the_same(built: Project) -> None:
    """nbgrader_config.py lets `nbgrader generate_assignment` work on this layout, and it gives what we commit."""
    shutil.copy(ROOT / "nbgrader_config.py", built.root)
    ours = built.learners.read_bytes()
    # nbgrader finds notebooks with glob, which takes [v1] for a pattern; our builder does not depend on the path.
    root = built.root.rename(built.root.with_name("课程 of lessons"))
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", "generate_assignment", "stage1_foundations", "--force", "--no-db"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = (root / "course" / f"{KEY}.ipynb").read_bytes()
    assert json.loads(theirs) == json.loads(ours)
    assert theirs == ours


def test_this_repositorys_course_is_current() -> None:
    assert build_course(check=True) == 0
