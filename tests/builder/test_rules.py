"""Every rule of CONTRIBUTING.md, broken once: one line that names file, line and cell and says what to do."""

import re

import pytest
from tiny_course import BODY, HEADER

from autograder.lesson import LessonError, read_lesson
from autograder.rules import judge

CHECKS = BODY[BODY.index("# %% check") : BODY.index("# %% tags")]
EXERCISE = BODY[BODY.index("# %% exercise") : BODY.index("# %% [markdown]\n# <details>")]
HINT = BODY[BODY.index("# %% [markdown]\n# <details>") : BODY.index("# %% check")]
SUPPORT = '# %% tags=["support"]\n# Support: a helper\ndef helper(x):\n    return x\n\n'

# (what is replaced, by what, what the error says after file and line, and perhaps a second replacement)
BROKEN = {
    "exercise without a check": (CHECKS, "", r'cell exercise "norm": has no check: add a cell'),
    "kernel that is not compiled": (
        "### BEGIN SOLUTION",
        "# @triton.jit\n    ### BEGIN SOLUTION",
        r'cell check "norm": launches a learner\'s kernel outside `checks.compiled\(\)`',
    ),
    "no hidden tests": (
        BODY[BODY.index("### BEGIN HIDDEN") : BODY.index('\n# %% check="norm" points=1')],
        "",
        r'cell exercise "norm": none of its checks has hidden tests',
    ),
    "hidden tests are only a comment": (
        BODY[BODY.index("for dimension") : BODY.index("### END HIDDEN")],
        "# later\n",
        r'cell exercise "norm": none of its checks has hidden tests',
    ),
    "check of an unknown exercise": (
        'check="norm" points=1',
        'check="nrom" points=1',
        r'cell check "nrom": there is no exercise of this name',
    ),
    "check before its exercise": (
        "# %%\nimport math",
        '# %% check="norm" points=1\nassert norm\n\n# %%\nimport math',
        r'cell check "norm": stands before its exercise',
    ),
    "id used twice": ("# %% tags", EXERCISE + "# %% tags", r'cell exercise "norm": the id is used twice \(first'),
    "answer used twice": (
        "# %% tags",
        '# %% [markdown] answer="why-root"\n# Twice.\n\n# %% tags',
        r'cell answer "why-root": the id is used twice',
    ),
    "points zero": ("points=2", "points=0", r'cell check "norm": `points` is 0, but must be a positive number'),
    "points negative": ("points=2", "points=-1", r'cell check "norm": `points` is -1'),
    "points no number": ("points=2", 'points="two"', r"cell check \"norm\": `points` is 'two'"),
    "points missing": (" points=2", "", r'cell check "norm": `points` is missing'),
    "minutes missing": (" minutes=5", "", r'cell exercise "norm": `minutes` is missing'),
    "difficulty missing": (" difficulty=2", "", r'cell exercise "norm": `difficulty` is missing'),
    "difficulty out of range": ("difficulty=2", "difficulty=4", r'cell exercise "norm": `difficulty` is 4, but'),
    "unknown mark": ("# %%\nimport", '# %% excercise="norm"\nimport', r"plain cell: does not know `excercise`"),
    "unknown tag": ('tags=["experiment"]', 'tags=["experment"]', r"plain cell: `tags` is \['experment'\], but must be"),
    "figure that is no experiment": ('tags=["experiment"]', 'tags=["figure"]', r"plain cell: `tags` is \['figure'\]"),
    "unknown path": ("difficulty=2", 'difficulty=2 path="less"', r"cell exercise \"norm\": `path` is 'less', but must"),
    "unknown kind": ("difficulty=2", 'difficulty=2 kind="quiz"', r"cell exercise \"norm\": `kind` is 'quiz', but must"),
    "support is prose": (
        "# %% [markdown]\n# ## Key",
        '# %% [markdown] tags=["support"]\n# ## Key',
        r"support cell: is a markdown cell, but must be code",
    ),
    "support used by an experiment": (
        '# %% tags=["experiment"]\n',
        SUPPORT + '# %% tags=["experiment"]\nprint(helper)\n',
        r"experiment cell: reads `helper`, which only the support cell in line \d+ makes: only checks may",
    ),
    "support used by an exercise": (
        "# %% exercise",
        SUPPORT + "# %% exercise",
        r'cell exercise "norm": reads `helper`, which only the support',
        "    return math.sqrt(",
        "    return helper(",
    ),
    "support used by a plain cell": (
        "# %% tags",
        SUPPORT + "# %%\nvalue = helper(3)\n\n# %% tags",
        r"plain cell: reads `helper`, which only the support cell",
    ),
    "support calls an exercise": (
        "# %% tags",
        '# %% tags=["support"]\n# Support: a value\nv = norm([1])\n\n# %% tags',
        r"support cell: uses `norm`, which is the learner's, as soon as it runs",
    ),
    "support without a title": (
        "# %% tags",
        SUPPORT.replace("Support: ", "") + "# %% tags",
        r"support cell: is shown folded: its first line must be its title, `# Support: …`",
    ),
    "figure without a title": (
        'tags=["experiment"]\n',
        'tags=["experiment", "figure"]\n# Figure: \n',
        r"figure cell: is shown folded: its first line must be its title, `# Figure: …`",
    ),
    "no hint": (HINT, "", r'cell exercise "norm": has no hint: put a Markdown cell that begins with'),
    "hint above": (
        "# A vector has",
        "# <details><summary>Hint</summary>Square.</details>\n#\n# A vector has",
        r"plain cell: holds a hint: move it into a cell of its own, right below its exercise",
    ),
    "hint inside other prose": (
        "# <details><summary>Hint",
        "# Now:\n# <details><summary>Hint",
        r'cell exercise "norm": has no hint',
    ),
    "two exercises of questions": (
        "difficulty=2\n",
        'difficulty=2 kind="questions"\n',
        r'cell exercise "again": is the second one of kind="questions" \(the first: "norm"\)',
        "# %% tags",
        (EXERCISE + CHECKS).replace('"norm"', '"again"').replace("=2\n", '=2 kind="questions"\n', 1) + "# %% tags",
    ),
    "numbered section": ("# ## Core ideas", "# ## 1 · Core ideas", r"plain cell: `## 1 · Core ideas` has a number"),
    "numbered exercise": ("# A vector", "# ### Exercise 1 · Norm\n# A vector", r"plain cell: `### Exercise 1 · Norm`"),
    "link to nothing": ("# A vector", "# See [](#nowhere). A vector", r"plain cell: `\[\]\(#nowhere\)` names no"),
    "label used twice": ("# ## Core ideas", "# ## Core {#a}\n# ## Core ideas {#a}", r"section heading: the label `a`"),
    "core too long": ("minutes=5", "minutes=200", r"time: the core path takes 205 min \(200 in exercises"),
    "long line of code": ("import math", "import math  # " + "very " * 20, r"text: the line has 115 columns"),
    "long line of prose": ("# A vector", "# " + "向量" * 25 + "# A vector", r"text: the line has \d+ columns"),
    "long header": ("Lengths of vectors", "Lengths of vectors " * 6, r"text: the line has \d+ columns"),
    "swallowed escape": ("# A vector", "# $\\big\bigl(x$ A vector", r"text: holds the control character '\\x08': was"),
    "tab": ("    return math", "\treturn math", r"text: holds the control character '\\t'"),
    "name in capitals": ('exercise="norm"', 'exercise="Norm"', r'cell exercise "Norm": a name has only lower-case'),
    "answer as code": (
        '[markdown] answer="why-root"',
        'answer="why-root"',
        r'cell answer "why-root": a model answer is prose',
    ),
    "does not parse": ("import math", "import math as", r"plain cell: does not parse"),
    "stub does not parse": (
        "(sum_of_squares)\n    ### END SOLUTION",
        "(\n    ### END SOLUTION\n        sum_of_squares)",
        r'cell exercise "norm": without the solution it does not parse',
    ),
    "stub does not raise": (
        "    ### BEGIN SOLUTION\n    sum_of_squares = sum(v * v for v in x)\n    return math.sqrt(sum_of_squares)\n"
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
        EXERCISE,
        '# %% exercise="norm" minutes=5 difficulty=2\ndef norm(x):\n    return math.hypot(*x)\n\n',
        r'cell exercise "norm": the whole answer is outside the markers',
    ),
    "never closed": ("    ### END SOLUTION\n", "", r'cell exercise "norm": `### BEGIN SOLUTION` is never closed'),
    "nested": (
        "    return math.sqrt(s",
        "    ### BEGIN SOLUTION\n    return math.sqrt(s",
        r'cell exercise "norm": `### BEGIN SOLUTION` inside another',
    ),
    "marker with words": (
        "### END SOLUTION",
        "### END SOLUTION of norm",
        r'cell exercise "norm": `### END SOLUTION of norm` is no',
    ),
    "solution in a plain cell": (
        "import math\n",
        "### BEGIN SOLUTION\nimport math\n### END SOLUTION\n",
        r"plain cell: `### BEGIN SOLUTION` belongs in exercise cells only",
    ),
    "hidden tests in an experiment": (
        "lengths =",
        "### BEGIN HIDDEN TESTS\n### END HIDDEN TESTS\nlengths =",
        r"experiment cell: `### BEGIN HIDDEN TESTS` belongs in check cells only",
    ),
    "solution left outside": (
        "    return math.sqrt(sum_of_squares)\n    ### END SOLUTION",
        "    ### END SOLUTION\n    return math.sqrt(sum_of_squares)",
        r'cell exercise "norm": reads `sum_of_squares` outside the markers, but only the solution makes it',
    ),
    "check reads an experiment": (
        CHECKS,
        '# %% tags=["experiment"]\nloss = 3\n\n' + CHECKS.replace("norm([]) == 0", "norm([]) < loss"),
        r'cell check "norm": reads `loss`, which only the experiment in line \d+ makes',
    ),
    "check reads an experiment in a function": (
        CHECKS,
        '# %% tags=["experiment"]\nloss = 3\n\n' + CHECKS + "def again():\n    return [loss for _ in '']\n\n",
        r'cell check "norm": reads `loss`, which only the experiment',
    ),
    "check reads another check": (
        "assert norm([]) == 0",
        "assert norm(ones[:0]) == 0",
        r'cell check "norm": reads `ones`, which only the check "norm" in line \d+ makes',
    ),
    "plain cell reads an experiment": (
        "# %% [markdown]\n# ## Key",
        "# %%\nprint(lengths)\n\n# %% [markdown]\n# ## Key",
        r"plain cell: reads `lengths`, which only the experiment",
    ),
    "check reads what is made below": (
        "# %% [markdown]\n# ## Key",
        '# %% check="norm" points=1\nassert late\n\n# %%\nlate = 1\n\n# %% [markdown]\n# ## Key',
        r'cell check "norm": reads `late`, which is made below it, in line \d+',
    ),
    "plain cell calls an exercise": (
        "# %% [markdown]\n# ## Key",
        "# %%\nunit = norm([1])\n\n# %% [markdown]\n# ## Key",
        r"plain cell: uses `norm`, which is the learner's, as soon as it runs",
    ),
    "check binds a given name anew": (
        "for dimension in (1",
        "math = 3\nfor dimension in (1",
        r'cell check "norm": binds `math` anew, which the plain cell in line \d+ makes and the exercise',
    ),
    "check binds anew what a later cell reads": (
        CHECKS,
        "# %%\ndimension = 3\n\n" + CHECKS + "# %%\nprint(dimension)\n\n",
        r'cell check "norm": binds `dimension` anew, which the plain cell in line \d+ makes and the plain cell in line',
    ),
    "check binds anew what an experiment made": (
        CHECKS,
        '# %% tags=["experiment"]\nones = 3\n\n' + CHECKS + '# %% tags=["experiment"]\nprint(ones)\n\n',
        r'cell check "norm": binds `ones` anew, which the experiment cell in line \d+ makes and the experiment cell in',
    ),
    "check binds anew what a later check reads": (
        CHECKS,
        "# %%\nones = 3\n\n" + CHECKS.replace("norm([]) == 0", "norm([ones]) == ones"),
        r'cell check "norm": binds `ones` anew, which the plain cell in line \d+ makes and the check cell in line',
    ),
    "check shows a comparison": (
        'assert norm([]) == 0, "no numbers: length 0"',
        "norm([]) == 0",
        r'cell check "norm": ends with `norm\(\[\]\) == 0`, whose value is shown: nbgrader takes it for a score',
    ),
    "check shows a method's value": (
        'assert norm([]) == 0, "no numbers: length 0"',
        "norm([]).item()",
        r'cell check "norm": ends with `norm\(\[\]\).item\(\)`, whose value',
    ),
    "check shows a name in its visible part": (
        "### BEGIN HIDDEN",
        "norm\n### BEGIN HIDDEN",
        r'cell check "norm": ends with `norm`, whose value',
    ),
    "check shows what a built-in function returns": (
        "### END HIDDEN",
        "len(ones) if ones else 'none'\n### END HIDDEN",
        r'cell check "norm": ends with `len\(ones\) if ones else \'none\'`, whose value',
    ),
    "header field missing": ('#     gpu: "Nothing more."\n', "", r"header: the field `gpu` is missing"),
    "header field unknown": ("#     gpu:", "#     minutes: 90\n#     gpu:", r"header: unknown field `minutes`"),
    "header of another type": ('gpu: "Nothing more."', "gpu: 3", r"header: `gpu` must be a text"),
    "header is not YAML": ('"Lengths of vectors."', '"Lengths', r"header: not valid YAML"),
    "no header": (HEADER, "", r"header: the file does not begin with a header"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_broken_rule_is_one_line(project, rule: str) -> None:
    old, new, message, *second = BROKEN[rule]
    project.replace(old, new)
    if second:
        project.replace(*second)
    lines = broken(project)
    shape = r"solutions/stage1_foundations/01_high_dimensional_intuition\.py:\d+: "
    assert any(re.match(shape + message, line) for line in lines), "\n".join(lines)
    assert all(re.match(shape, line) and "\n" not in line for line in lines)


# What is like a breach and is none.
KEPT = {
    "check uses support": ("# %% check", SUPPORT + "# %% check", "norm([]) == 0", "norm([]) == helper(0)"),
    "support uses support": (
        "# %% tags",
        SUPPORT + SUPPORT.replace("helper", "other").replace("x\n\n", "helper(x)\n\n") + "# %% tags",
    ),
    "hint below the checks": (HINT, "", "# %% tags", HINT + "# %% tags"),
    "questions need no hint": (HINT, "", "difficulty=2", 'difficulty=2 kind="questions"'),
    "details that are no hint": ("# A vector", "# <details><summary>Proof</summary>Clear.</details>\n# A vector"),
    "long address": ("# A vector", f"# [A](https://example.org/{'a' * 90}) and http://example.org/{'b' * 90} vector"),
    "long row of a table": ("# A vector", f"# | a | {'b' * 100} |\n# A vector"),
    "long formula": ("# A vector", f"# $$ {'x + ' * 30} y $$\n# A vector"),
    "year at the beginning of a heading": ("# ## Core ideas", "# ## 2017 and what it began"),
    "magic": ("import math", "%matplotlib inline\nimport math"),
    "check binds anew what nobody reads later": (CHECKS, "# %%\nones = 3\n\n" + CHECKS),
    "check binds anew what is made again before it is read": (
        CHECKS,
        "# %%\nones = 3\n\n" + CHECKS + "# %%\nones = 3\n\n# %%\nprint(ones)\n\n",
    ),
    "check binds in a function": (
        CHECKS,
        "# %%\nones = 3\n\n" + CHECKS.replace("ones", "other") + "# %%\nprint(ones)\n\n",
        "### END HIDDEN",
        "def again():\n    ones = 2\n    return ones\n### END HIDDEN",
    ),
    "check imports again": ("for dimension in (1", "import math\nfor dimension in (1"),
    "check ends with a call": ('assert norm([]) == 0, "no numbers: length 0"', "norm([])"),
    "check ends with a call if need be": ('assert norm([]) == 0, "no numbers: length 0"', "norm([]) and norm([])"),
    "check ends with a value in silence": ('assert norm([]) == 0, "no numbers: length 0"', "norm([]) == 0;"),
    "name of a check that the check itself makes": ("assert norm([]) == 0", "ones = [1.0]\nassert norm(ones[:0]) == 0"),
}


@pytest.mark.parametrize("rule", KEPT)
def test_kept_rule_is_not_told(project, rule: str) -> None:
    replacements = KEPT[rule]
    for old, new in zip(replacements[::2], replacements[1::2], strict=True):
        project.replace(old, new)
    assert broken(project) == []


def test_many_breaches_of_one_rule_are_counted(project) -> None:
    project.replace("import math", "import math\n" + ("# " + "long " * 30 + "\n") * 20)
    assert sum("columns" in line for line in broken(project)) == 5
    assert broken(project)[-1].endswith("rule `width`: broken 15 times more from here on")


def broken(project) -> list[str]:
    """The lines about the project's lesson."""
    try:
        return judge(read_lesson(project.source))
    except LessonError as error:
        return error.lines


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
        "plain",
        "plain",
        "exercise",
        "plain",
        "check",
        "check",
        "experiment",
        "plain",
        "answer",
        "plain",
    ]
    assert [c.id for c in lesson.cells if c.role in ("exercise", "check", "answer")] == [
        "norm",
        "norm-check-1",
        "norm-check-2",
        "answer-why-root",
    ]
    assert judge(lesson) == []


def test_same_text_twice_has_two_ids(project) -> None:
    project.replace("# %%\nimport math", "# %%\nimport math\n\n# %%\nimport math")
    ids = [c.id for c in read_lesson(project.source).cells]
    assert len(set(ids)) == len(ids)
    twins = [i for i in ids if i.startswith("code-")]
    assert twins[1] == f"{twins[0]}-2"


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: b"\xef\xbb\xbf" + text.encode(),
    ],
    ids=["CRLF", "byte-order mark"],
)
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
