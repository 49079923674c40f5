"""`make check PROJECT=5`: what to write, and what the acceptance test says of it."""

from autograder.learner.projects import check_project


def test_a_project_that_is_not_begun_says_what_to_write(project, capsys) -> None:
    assert check_project("5", project) == 1
    told = capsys.readouterr().out
    assert told.startswith("5 Reasoning by reinforcement learning · starts from lesson 23, lesson 40\n")
    assert "Write work/projects/5_reasoning.py, which defines:" in told
    assert "def after(words):" in told


def test_a_project_is_found_by_its_number_or_name_and_measured(project, capsys) -> None:
    folder = project / "work" / "projects"
    folder.mkdir()
    text = "def before(words):\n    return words\n\n\ndef after(words):\n    return [word[::-1] for word in words]\n"
    (folder / "5_reasoning.py").write_text(text, encoding="utf-8")
    for which in ("5", "05", "reasoning", "5_reasoning.py"):
        assert check_project(which, project) == 0
        assert capsys.readouterr().out.endswith("accepted\n")
    (folder / "5_reasoning.py").write_text(text.replace("[::-1]", ""), encoding="utf-8")
    assert check_project("5", project) == 1
    assert "✗ It writes words of three to five letters backwards. 0% of 200 are right" in capsys.readouterr().out


def test_a_project_that_there_is_not(project, capsys) -> None:
    assert check_project("9", project) == 2
    assert "no project is called '9'; the projects are:\n  1  A mini-GPT\n" in capsys.readouterr().err
