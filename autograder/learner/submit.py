"""`make submit`: a learner's notebooks in one zip archive, in the layout that `make grade` takes.

<student>.zip, or <student>_stage2.zip
    <student>/<stage>/<lesson>.ipynb, and beside it what lies beside it in work/
"""

import io
import sys
import unicodedata
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from autograder import catalog
from autograder.catalog import UsageError
from autograder.grading.beside import tell_left_out
from autograder.grading.files import find_files, may_be_notebook
from autograder.grading.owners import WRAPPERS, Placing
from autograder.grading.rebuild import Unreadable, find_own_text, read_name, read_role
from autograder.layout import ROOT, write
from autograder.learner.merge import merge
from autograder.learner.work import Work

LONGEST = 80  # characters of a student's name
MARKS = " ._-@+"  # in it, besides letters and digits of any language
RESERVED = ("con", "prn", "aux", "nul")  # Windows has no files of these names


@dataclass
class PackedLesson:
    """A lesson that was looked at: its bytes, if it is handed in, and what is to be said of it."""

    key: str
    data: bytes | None = None
    written: int = 0
    missing: list[str] = field(default_factory=list)  # exercises that were not begun
    trouble: str = ""
    beside: dict[str, bytes] = field(default_factory=dict)  # place from the stage's folder on → content
    left_out: list[str] = field(default_factory=list)  # of what lies beside


def submit_work(student: str, stage: str | None = None, root: Path = ROOT) -> int:
    """Writes the archive and prints what is in it and what is missing; returns the exit code."""
    work = Work(root)
    try:
        student = read_student(student)
        keys = work.select(None, stage)
        packed = [pack_lesson(work, key) for key in keys]
        handed = [one for one in packed if one.data is not None]
        if not handed:
            raise UsageError("there is nothing to hand in: no notebook in work/ has an answer" + _tell_troubles(packed))
        number = f"_stage{catalog.BY_KEY[keys[0]].stage.number}" if stage else ""
        path = work.folder / f"{student}{number}.zip"
        archive = make_archive(student, handed)
        with work.lock():
            write(path, archive)
            placed = _read_back(path, student)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"the archive cannot be written: {error.strerror}; your notebooks are as they were", file=sys.stderr)
        return 1
    if placed != len(handed):
        path.unlink()
        print(f"STUDENT={student!r} is a name that a grader would not understand: use your login", file=sys.stderr)
        return 2
    _print_packed(work, path, packed)
    return 1 if any(one.trouble for one in packed) else 0


def read_student(given: str) -> str:
    """The student's name in its usual form; UsageError where it can be no folder's name everywhere."""
    student = unicodedata.normalize("NFC", given.strip())
    strange = sorted({letter for letter in student if not (letter.isalnum() or letter in MARKS)})
    stages = [stage.folder for stage in catalog.STAGES]
    if not student:
        raise UsageError("make submit asks who you are: make submit STUDENT=your-login")
    if strange:
        raise UsageError(f"STUDENT={student!r}: {' '.join(strange)} cannot be in it; letters, digits and {MARKS} can")
    if student[0] in MARKS or student[-1] in MARKS or len(student) > LONGEST:
        raise UsageError(f"STUDENT={student!r}: it begins and ends with a letter or digit, and has {LONGEST} at most")
    if student.casefold() in (*WRAPPERS, *stages, *RESERVED):
        raise UsageError(f"STUDENT={student!r} is the name of a folder of the course: use your login")
    return student


def pack_lesson(work: Work, key: str) -> PackedLesson:
    """A learner's notebook as it lies, if it can be read and something is written in it."""
    one = PackedLesson(key)
    path = work.find_copy(key)
    try:
        data = work.read_copy(key)
        if data is None:
            return one
        course = work.read_course(key)
        untouched, _ = merge(course, course.encode())
        stubs = {
            read_name(cell): find_own_text(cell.source)
            for cell in untouched.cells
            if read_role(cell) in ("exercise", "answer")
        }
        merged, changes = merge(course, data, work.read_base(key, data))
        if changes.answers or changes.added:
            places, one.left_out = work.find_beside(key)
            one.beside = {place: (path.parent / place).read_bytes() for place in places}
            one.data = data
    except (OSError, Unreadable) as error:
        one.trouble = f"{work.show_path(path)}: {error}"
        return one
    exercises = [cell for cell in merged.cells if read_role(cell) == "exercise"]
    one.missing = [read_name(cell) for cell in exercises if find_own_text(cell.source) in ("", stubs[read_name(cell)])]
    one.written = len(exercises) - len(one.missing)
    return one


def make_archive(student: str, handed: list[PackedLesson]) -> bytes:
    """The zip archive; its names are UTF-8, and say so."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for one in handed:
            archive.writestr(f"{student}/{one.key}.ipynb", one.data)
        beside = {f"{one.key.split('/')[0]}/{place}": data for one in handed for place, data in one.beside.items()}
        for place, data in sorted(beside.items()):
            archive.writestr(f"{student}/{place}", data)
    return buffer.getvalue()


def _read_back(path: Path, student: str) -> int:
    """The number of the archive's notebooks that the grader takes for this student's."""
    found = find_files(path)
    Placing(found, {*WRAPPERS, *(stage.folder for stage in catalog.STAGES)}).place()
    read = [file for file in found.files if may_be_notebook(file.name)]
    return sum(file.student == student and not file.problem for file in read)


def _tell_troubles(packed: list[PackedLesson]) -> str:
    return "".join(f"\n  cannot be read: {one.trouble}" for one in packed if one.trouble)


def _print_packed(work: Work, path: Path, packed: list[PackedLesson]) -> None:
    handed = [one for one in packed if one.data is not None]
    print(f"{work.show_path(path)}: {len(handed)} notebooks, {path.stat().st_size / 1e6:.1f} MB. Hand in this file.")
    for one in handed:
        told = f"{one.written} of {one.written + len(one.missing)} exercises written"
        print(f"  {one.key}: {told}" + (f"; not begun: {', '.join(one.missing)}" if one.missing else ""))
    beside = {f"{one.key.split('/')[0]}/{place}" for one in handed for place in one.beside}
    if beside:
        print(f"  beside them: {', '.join(sorted(beside))}")
    for line in dict.fromkeys(tell_left_out(one.left_out) for one in handed if one.left_out):
        print(f"  NOT in it: {line}")
    left = [catalog.BY_KEY[one.key] for one in packed if one.data is None and not one.trouble]
    if left:
        print(f"  not in it, because nothing is written there: {', '.join(f'{entry.number:02}' for entry in left)}")
    for one in packed:
        if one.trouble:
            print(f"  NOT in it, because it cannot be read: {one.trouble}; what it was before: work/.earlier")
