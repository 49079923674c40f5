"""A class of any size: every student's notebooks, made from the lessons and the answers that prove their checks.

Each exercise is answered by the reference, by a right or a wrong answer of tests/answers/, or not at all, by SHARES;
MISSING of the notebooks are not handed in. A notebook depends on the seed, the student's number and the lesson only: a
smaller class, or one over fewer lessons, has the same notebooks.
"""

import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from autograder.catalog import Entry
from autograder.layout import ROOT, Layout

sys.path.append(str(ROOT / "tests"))
sys.path.append(str(ROOT / "tests" / "support"))

from answers_file import read_answers
from sample_class import Lesson, dumps, read_lesson

SHARES = {"reference": 0.6, "right": 0.1, "wrong": 0.2, "stub": 0.1}  # of the exercises
MISSING = 0.05  # of the notebooks
FAMILIES = ("李 li", "王 wang", "张 zhang", "刘 liu", "陈 chen", "杨 yang", "赵 zhao", "黄 huang", "周 zhou", "吴 wu")
GIVEN = ("雷 lei", "梅 mei", "伟 wei", "芳 fang", "娜 na", "敏 min", "静 jing", "强 qiang", "磊 lei", "洋 yang")


def students(count: int) -> list[str]:
    """Their folders: `001-li-lei`, `002-李梅`, … Every other one is written in Chinese."""
    found = []
    for number in range(count):
        family, given = (FAMILIES[number // 10 % 10].split(), GIVEN[number % 10].split())
        name = f"{family[1]}-{given[1]}" if number % 2 == 0 else family[0] + given[0]
        found.append(f"{number + 1:03}-{name}")
    return found


def written_answers(entry: Entry, lesson: Lesson, root: Path) -> dict[str, dict[str, list[str]]]:
    """All answers of a lesson's file in tests/answers/: {"right": {exercise: [source, …]}, "wrong": …}."""
    found: dict[str, dict[str, list[str]]] = {"right": {}, "wrong": {}}
    for answer in read_answers(root / "tests" / "answers" / f"{entry.key}.py", lesson.solution):
        found[answer.kind].setdefault(answer.exercise, []).append(answer.source)
    return found


def make_class(folder: Path, entries: Sequence[Entry], count: int, seed: int, root: Path = ROOT) -> list[Path]:
    """Writes the notebooks of `count` students for these lessons, which have been built; returns their paths."""
    shutil.rmtree(folder, ignore_errors=True)
    made = []
    for entry in tqdm(entries, unit="lesson", desc="generating", dynamic_ncols=True):
        lesson = read_lesson(entry, Layout(root))
        written = written_answers(entry, lesson, root)
        for number, student in enumerate(students(count)):
            path = folder / student / f"{entry.key}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)  # also of a student who hands in nothing
            drawn = random.Random(f"{seed} {number} {entry.key}")
            if drawn.random() < MISSING:
                continue
            answers = {}
            for exercise, reference in lesson.solution.items():
                (kind,) = drawn.choices(list(SHARES), list(SHARES.values()))
                texts = {"reference": [reference], "stub": []}.get(kind) or written.get(kind, {}).get(exercise)
                if texts:
                    answers[exercise] = drawn.choice(texts)
            path.write_bytes(dumps(lesson.notebook(answers)))
            made.append(path)
    return sorted(made)
