"""The table of answers for one lesson.

    make prove LESSON=09 [ANSWERS=file.py] [MUTANTS=1] [JUDGED=1]
    python tests/prove.py 09 [--answers FILE] [--mutants] [--judged]

Without options: the lesson's own answers and the fakes, as in tests/test_answers.py. With --answers: those of a file
from anywhere. With --mutants: small changes made to the reference, one by one, and those that keep all points listed;
many of them are right answers too, so that each wants a look. With --judged: as a class is graded, the checks in the
judge's process (the fakes are left out). Exit 1 where an answer is judged otherwise than it says.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import answers_harness as harness  # noqa: E402
import answers_mutants  # noqa: E402

from autograder.lesson import LessonError, read_lesson  # noqa: E402
from autograder.text import print_anything  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", help="its number")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="answers to judge instead of the lesson's own")
    parser.add_argument("--mutants", action="store_true", help="judge small changes of the reference instead")
    parser.add_argument("--judged", action="store_true", help="run checks in the judge's process, as grading does")
    chosen = parser.parse_args()
    print_anything()
    chosen.answers = chosen.answers and chosen.answers.expanduser()  # a Makefile's quotes keep the shell from it
    found = sorted((ROOT / "solutions").glob(f"*/{chosen.lesson.zfill(2)}_*.py"))
    if len(found) != 1:
        return refuse(f'no lesson "{chosen.lesson}" in solutions/: its number is asked for, such as 09')
    if chosen.answers and not chosen.answers.is_file():
        return refuse(f"{chosen.answers}: no such file")
    try:
        lesson = read_lesson(found[0])
        own = ROOT / "tests" / "answers" / found[0].parent.name / found[0].name
        answers = harness.collect(lesson, chosen.answers or own)
        if chosen.answers:
            answers = [a for a in answers if a.kind in ("reference", "wrong", "right")]
        if chosen.mutants:
            answers = [a for a in answers if a.kind == "reference"] + answers_mutants.mutants(lesson)
        if chosen.judged:
            answers = [a for a in answers if not a.targets]
        outcomes = harness.run_answers(lesson, answers, judged=chosen.judged)
    except (LessonError, harness.AnswersError) as error:
        return refuse(str(error))
    rows = [harness.row(a, outcomes[a.id]) for a in answers]
    print("\n".join(harness.table(rows, messages=not chosen.mutants)))
    bad = sum(r["state"] == "bad" for r in rows)
    if chosen.mutants:
        print(f"{bad} of {sum(r['kind'] == 'wrong' for r in rows)} mutants keep all points")
        return 0
    print(f"{bad} of {len(rows)} answers are judged otherwise than they say" if bad else "all as they should be")
    return 1 if bad else 0


def refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
