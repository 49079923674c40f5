"""Every rule of CONTRIBUTING.md, broken once: one line that names file, line and cell and says what to do."""

import re

import pytest
from tiny_course import BODY, HEADER

from autograder.lesson import LessonError, read_lesson

CHECKS = BODY[BODY.index("# %% check") : BODY.index("# %% tags")]
EXERCISE = BODY[BODY.index("# %% exercise") : BODY.index("# %% check")]

# (what is replaced, by what, what the error says after file and line)
BROKEN = {
    "exercise without a check": (CHECKS, "", r'cell exercise "norm": has no check: add a cell'),
    "no hidden tests": (
        BODY[BODY.index("### BEGIN HIDDEN") : BODY.index('\n# %% check="norm" points=1')], "",
        r'cell exercise "norm": none of its checks has hidden tests',
    ),
    "hidden tests are only a comment": (
        BODY[BODY.index("for dimension") : BODY.index("### END HIDDEN")], "# later\n",
        r'cell exercise "norm": none of its checks has hidden tests',
    ),
    "check of an unknown exercise": ('check="norm" points=1', 'check="nrom" points=1',
                                     r'cell check "nrom": there is no exercise of this name'),
    "check before its exercise": ("# %%\nimport math", '# %% check="norm" points=1\nassert norm\n\n# %%\nimport math',
                                  r'cell check "norm": stands before its exercise'),
    "id used twice": ("# %% tags", EXERCISE + "# %% tags", r'cell exercise "norm": the id is used twice \(first'),
    "answer used twice": ("# %% tags", '# %% [markdown] answer="why-root"\n# Twice.\n\n# %% tags',
                          r'cell answer "why-root": the id is used twice'),
    "points zero": ("points=2", "points=0", r'cell check "norm": `points` is 0, but must be a positive number'),
    "points negative": ("points=2", "points=-1", r'cell check "norm": `points` is -1'),
    "points no number": ("points=2", 'points="two"', r"cell check \"norm\": `points` is 'two'"),
    "points missing": (" points=2", "", r'cell check "norm": `points` is missing'),
    "minutes missing": (" minutes=5", "", r'cell exercise "norm": `minutes` is missing'),
    "difficulty missing": (" difficulty=2", "", r'cell exercise "norm": `difficulty` is missing'),
    "difficulty out of range": ("difficulty=2", "difficulty=4", r'cell exercise "norm": `difficulty` is 4, but'),
    "unknown mark": ("# %%\nimport", '# %% excercise="norm"\nimport', r"plain cell: does not know `excercise`"),
    "unknown tag": ('tags=["experiment"]', 'tags=["experment"]', r"plain cell: does not know `tags`"),
    "name in capitals": ('exercise="norm"', 'exercise="Norm"', r'cell exercise "Norm": a name has only lower-case'),
    "answer as code": ('[markdown] answer="why-root"', 'answer="why-root"',
                       r'cell answer "why-root": a model answer is prose'),
    "does not parse": ("import math", "import math as", r"plain cell: does not parse"),
    "stub does not parse": (
        "(sum_of_squares)\n    ### END SOLUTION", "(\n    ### END SOLUTION\n        sum_of_squares)",
        r'cell exercise "norm": without the solution it does not parse',
    ),
    "stub does not raise": (
        '    ### BEGIN SOLUTION\n    sum_of_squares = sum(v * v for v in x)\n    return math.sqrt(sum_of_squares)\n'
        "    ### END SOLUTION",
        '    """\n    ### BEGIN SOLUTION\n    ### END SOLUTION\n    """\n    return 5.0',
        r'cell exercise "norm": the stub would not raise NotImplementedError: a marker stands inside a string',
    ),
    "stub's raise is caught": (
        EXERCISE,
        '# %% exercise="norm" minutes=5 difficulty=2\ndef norm(x):\n    try:\n        ### BEGIN SOLUTION\n'
        "        return math.hypot(*x)\n        ### END SOLUTION\n    except Exception:\n        return 0\n\n",
        r'cell exercise "norm": the stub would not raise NotImplementedError: a `try`',
    ),
    "no markers": ("    ### BEGIN SOLUTION\n", "", r"cell exercise \"norm\": `### END SOLUTION` without"),
    "no solution at all": (
        EXERCISE, '# %% exercise="norm" minutes=5 difficulty=2\ndef norm(x):\n    return math.hypot(*x)\n\n',
        r'cell exercise "norm": the whole answer is outside the markers',
    ),
    "never closed": ("    ### END SOLUTION\n", "", r'cell exercise "norm": `### BEGIN SOLUTION` is never closed'),
    "nested": ("    return math.sqrt(s", "    ### BEGIN SOLUTION\n    return math.sqrt(s",
               r'cell exercise "norm": `### BEGIN SOLUTION` inside another'),
    "marker with words": ("### END SOLUTION", "### END SOLUTION of norm",
                          r'cell exercise "norm": `### END SOLUTION of norm` is no'),
    "solution in a plain cell": ("import math\n", "### BEGIN SOLUTION\nimport math\n### END SOLUTION\n",
                                 r"plain cell: `### BEGIN SOLUTION` belongs in exercise cells only"),
    "hidden tests in an experiment": ("lengths =", "### BEGIN HIDDEN TESTS\n### END HIDDEN TESTS\nlengths =",
                                      r"experiment cell: `### BEGIN HIDDEN TESTS` belongs in check cells only"),
    "solution left outside": (
        "    return math.sqrt(sum_of_squares)\n    ### END SOLUTION",
        "    ### END SOLUTION\n    return math.sqrt(sum_of_squares)",
        r'cell exercise "norm": reads `sum_of_squares` outside the markers, but only the solution makes it',
    ),
    "check reads an experiment": (
        CHECKS, '# %% tags=["experiment"]\nloss = 3\n\n' + CHECKS.replace("norm([]) == 0", "norm([]) < loss"),
        r'cell check "norm": reads `loss`, which only the experiment in line \d+ makes',
    ),
    "check reads an experiment in a function": (
        CHECKS, '# %% tags=["experiment"]\nloss = 3\n\n' + CHECKS + "def again():\n    return [loss for _ in '']\n\n",
        r'cell check "norm": reads `loss`, which only the experiment',
    ),
    "check reads another check": ("assert norm([]) == 0", "assert norm(ones[:0]) == 0",
                                  r'cell check "norm": reads `ones`, which only the check "norm" in line \d+ makes'),
    "plain cell reads an experiment": ("# %% [markdown]\n# **Why", "# %%\nprint(lengths)\n\n# %% [markdown]\n# **Why",
                                       r"plain cell: reads `lengths`, which only the experiment"),
    "check reads what is made below": (
        "# %% [markdown]\n# **Why",
        '# %% check="norm" points=1\nassert late\n\n# %%\nlate = 1\n\n# %% [markdown]\n# **Why',
        r'cell check "norm": reads `late`, which is made below it, in line \d+',
    ),
    "plain cell calls an exercise": ("# %% [markdown]\n# **Why", "# %%\nunit = norm([1])\n\n# %% [markdown]\n# **Why",
                                     r"plain cell: uses `norm`, which is the learner's, as soon as it runs"),
    "header field missing": ("#     minutes: 90\n", "", r"header: the field `minutes` is missing"),
    "header field unknown": ("#     minutes: 90", "#     minutes: 90\n#     author: me", r"header: unknown field `a"),
    "header of another type": ("minutes: 90", 'minutes: "90"', r"header: `minutes` must be of type int"),
    "header is not YAML": ('"Lengths of vectors."', '"Lengths', r"header: not valid YAML"),
    "header's title": ("Geometry of high", "Geometry in high", r"header: `title` is 'Geometry in high-dim"),
    "header's Chinese title": ("高维空间", "高维", r"header: `title_zh` is"),
    "header's prerequisites": ("requires: []", "requires: [2]",
                               r"header: `requires` is \[2\], but autograder/catalog.py says \[\]"),
    "no header": (HEADER, "", r"header: the file does not begin with a header"),
}  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN)
def test_broken_rule_is_one_line(project, rule: str) -> None:
    old, new, message = BROKEN[rule]
    project.replace(old, new)
    with pytest.raises(LessonError) as caught:
        read_lesson(project.source)
    shape = r"solutions/stage1_foundations/01_high_dimensional_intuition\.py:\d+: "
    assert any(re.match(shape + message, line) for line in caught.value.lines), str(caught.value)
    assert all(re.match(shape, line) and "\n" not in line for line in caught.value.lines)


def test_line_is_that_of_the_cell(project) -> None:
    project.replace("points=2", "points=0")
    with pytest.raises(LessonError) as caught:
        read_lesson(project.source)
    line = int(caught.value.lines[0].split(":")[1])
    assert project.text.split("\n")[line - 1] == '# %% check="norm" points=0'


def test_every_breach_is_told_at_once(project) -> None:
    project.replace("points=2", "points=0")
    project.replace("difficulty=2", "difficulty=7")
    with pytest.raises(LessonError) as caught:
        read_lesson(project.source)
    assert len(caught.value.lines) == 2


def test_sound_lesson_is_read(project) -> None:
    lesson = read_lesson(project.source)
    assert [c.role for c in lesson.cells] == [
        "plain", "plain", "exercise", "check", "check", "experiment", "plain", "answer",
    ]  # fmt: skip
    assert [c.id for c in lesson.cells if c.role in ("exercise", "check", "answer")] == [
        "norm", "norm-check-1", "norm-check-2", "answer-why-root",
    ]  # fmt: skip
    assert lesson.header.minutes == 90
    assert lesson.header.papers == ("Somebody 2017, A paper, arXiv:1706.03762",)


def test_same_text_twice_has_two_ids(project) -> None:
    project.replace("# %%\nimport math", "# %%\nimport math\n\n# %%\nimport math")
    ids = [c.id for c in read_lesson(project.source).cells]
    assert len(set(ids)) == len(ids)
    twins = [i for i in ids if i.startswith("code-")]
    assert twins[1] == f"{twins[0]}-2"


@pytest.mark.parametrize("encode", [
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: b"\xef\xbb\xbf" + text.encode(),
], ids=["CRLF", "byte-order mark"])  # fmt: skip
def test_editors_of_windows(project, encode) -> None:
    before = read_lesson(project.source)
    project.source.write_bytes(encode(project.text))
    assert read_lesson(project.source).cells == before.cells


def test_not_utf8(project) -> None:
    project.source.write_bytes(project.text.encode("utf-16"))
    with pytest.raises(LessonError, match=r":1: header: the file is not UTF-8"):
        read_lesson(project.source)


def test_name_outside_the_catalog(project) -> None:
    other = project.source.with_name("01_geometry.py")
    project.source.rename(other)
    with pytest.raises(LessonError, match=r"01_geometry\.py:1: header: no such lesson in autograder/catalog\.py"):
        read_lesson(other)


def test_a_name_bound_in_the_check_itself_is_its_own(project) -> None:
    project.replace("assert norm([]) == 0", "ones = [1.0]\nassert norm(ones[:0]) == 0")
    read_lesson(project.source)


def test_magics_are_no_syntax_errors(project) -> None:
    project.replace("import math", "%matplotlib inline\nimport math")
    read_lesson(project.source)
