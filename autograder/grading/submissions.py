"""What was handed in: every file under SUBMITTED becomes a student's notebook of a lesson, or a line that says why not.

Whose a file is, its place says:

    <student>/…                                              nbgrader's layout, with or without a folder for the stage
    <student>.zip, or a zip of <student>/<stage>/<lesson>.ipynb (`make submit`), or of a whole class
    <name>_<number>_assignsubmission_file_/…                 Moodle; or the same before a file's name
    <name>_<number>_<number>_<file>, <name>_LATE_…           Canvas
    <student>+<assignment>+<time>[+<random>]/…               nbgrader's exchange

Which lesson a notebook is, it says itself: in its metadata (`llm40.lesson`), by the ids and the text of its cells, and
only then by its name. Two different notebooks for one lesson wait for a person. No file is unpacked, moved or changed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from autograder.grading.archives import BadArchive
from autograder.grading.beside import choose_beside, may_go_along, tell_left_out
from autograder.grading.clerk import read_submission_safely
from autograder.grading.files import (
    ASIDE,
    BESIDE,
    CHECKPOINTS,
    ELSEWHERE,
    IGNORED,
    OTHER,
    REFUSED,
    SAME,
    TAKEN,
    UNPLACED,
    WAITS,
    Delivery,
    File,
    find_files,
    may_be_notebook,
)
from autograder.grading.masters import MasterLesson
from autograder.grading.owners import WRAPPERS, Placing
from autograder.grading.rebuild import (
    SubmittedCell,
    Unreadable,
    find_own_text,
    looks_like,
    match_cells,
    read_name,
    read_role,
)

LOOKED_INTO = 20_000_000  # bytes; a longer notebook is known by its two ends and its name
PAGES = ("index.ipynb", "notation.ipynb")  # of the course, beside the lessons
ARCHIVES = (".rar", ".7z", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")
LEFTOVERS = ("~", ".bak", ".orig", ".tmp", ".swp", ".part", ".crdownload")
CLAIM = re.compile(r'"llm40"\s*:\s*\{.{0,400}?"lesson"\s*:\s*"([^"\\]+)"', re.DOTALL)


@dataclass
class Submission:
    """One notebook to grade; `file` is None where the student handed in others but not this one.

    `undecided` says why no file is taken although there are some: a person must choose.
    """

    student: str
    lesson: MasterLesson
    file: File | None = None
    flags: list[str] = field(default_factory=list)
    undecided: str = ""
    beside: dict[str, File] = field(default_factory=dict)  # place from the notebook's folder on → file

    def read(self) -> bytes | None:
        """The notebook's bytes, None where there is none. Raises OSError and BadArchive."""
        return self.file.read() if self.file else None

    def read_beside(self) -> dict[str, bytes]:
        """The files beside the notebook: place → content. A flag names those that cannot be read."""
        files = {}
        for place, file in self.beside.items():
            try:
                files[place] = file.read()
            except (OSError, BadArchive) as error:
                self.flags.append(f"file: {place}, beside the notebook, cannot be read: {error}")
        return files


def collect(submitted: Path, stages: Collection[str]) -> Delivery:
    """Every file under a folder, or in a zip archive, and whose it is. `stages` are folders that are no student's."""
    found = find_files(submitted)
    Placing(found, {*WRAPPERS, *stages}).place()
    return found


# --- which lesson ---------------------------------------------------------------------------------------------


def read_claimed_lesson(data: bytes) -> str | None:
    """The lesson, as <stage>/<lesson>, that a notebook's metadata names, in a notebook's text or in its two ends."""
    found = CLAIM.search(data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1", "replace"))
    return found[1] if found else None


def find_named_lesson(file: str, names: Collection[str]) -> str | None:
    """The lesson whose name stands in a file's name: `Copy of 09_x (1).ipynb`, `09_x_ada.ipynb`, `09 x.IPYNB`."""
    stem = re.sub(r"[\s_-]+", "_", file.casefold())
    found = [known for known in names if known.casefold() in stem]
    return max(found, key=len) if found else None


def name_lessons(found: Delivery, names: Collection[str]) -> set[str] | None:
    """The lessons that the files' metadata and names tell of; None where a notebook tells of none."""
    told: set[str] = set()
    for file in found.files:
        if _is_passed_over(file) or not may_be_notebook(file.name):
            continue
        try:
            claim = read_claimed_lesson(file.peek())
        except (OSError, BadArchive):
            claim = None
        here = {claim and claim.rsplit("/", 1)[-1], find_named_lesson(file.name, names)} & set(names)
        if not here:
            return None
        told |= here
    return told


def find_lessons(found: Delivery, lessons: Sequence[MasterLesson], names: Collection[str]) -> None:
    """Says of every file which lesson it is, or what it is instead. `names` are those of the whole course."""
    finder = LessonFinder(lessons, names)
    for file in found.files:
        finder.place(file)


def _is_passed_over(file: File) -> bool:
    """Whether a file is not looked into."""
    hidden = CHECKPOINTS in file.parts or file.name.startswith(".")
    return bool(file.problem) or hidden or file.name in PAGES or file.name.lower().endswith(LEFTOVERS)


class LessonFinder:
    """Knows a notebook by what its metadata claims, by its cells, and by its name, in this order."""

    def __init__(self, lessons: Sequence[MasterLesson], names: Collection[str]):
        self.lessons = lessons
        self.names = {*names, *(lesson.name for lesson in lessons)}
        self.by_name = {lesson.name: lesson for lesson in lessons}
        self.counted = Counter(identifier for lesson in lessons for identifier in lesson.ids)

    def place(self, file: File) -> None:
        """Sets the file's lesson, or says what became of it."""
        if file.problem:
            return file.settle(REFUSED, file.problem)
        if _is_passed_over(file):
            why = "a page of the course" if file.name in PAGES else "kept or left behind by a program"
            return file.settle(IGNORED, why)
        try:
            if not may_be_notebook(file.name) and not _holds_notebook(file):
                return file.settle(OTHER, _describe_other_file(file.name))
            claim = read_claimed_lesson(file.peek())
        except BadArchive as error:
            return file.settle(REFUSED, str(error))
        except OSError:
            claim = None  # its name may say what it is; it is then graded as a fault
        lesson = self._find_lesson(file, claim and claim.rsplit("/", 1)[-1])
        file.lesson = self.by_name.get(lesson or "")
        if lesson and file.lesson is None:
            return file.settle(ELSEWHERE, lesson)
        if lesson is None:
            return file.settle(
                UNPLACED, f"{claim} is no lesson of this course" if claim else _describe_strangeness(file)
            )
        if file.student is None:
            return file.settle(UNPLACED, "no student's folder is around it")
        return file.read_stamp()

    def _find_lesson(self, file: File, claimed: str | None) -> str | None:
        claimed = claimed if claimed in self.names else None
        named = find_named_lesson(file.name, self.names)
        if claimed and named in (None, claimed):
            return claimed
        try:
            cells, _ = look_into(file)
        except (OSError, BadArchive, Unreadable):
            return claimed or named
        return self._find_lesson_by_ids(cells) or claimed or self._find_lesson_by_text(cells) or named

    def _find_lesson_by_ids(self, cells: Sequence[SubmittedCell]) -> str | None:
        marks = {cell.grade_id for cell in cells} | {cell.id for cell in cells}
        return _find_most_voted({k.name: sum(self.counted[mark] == 1 for mark in marks & k.ids) for k in self.lessons})

    def _find_lesson_by_text(self, cells: Sequence[SubmittedCell]) -> str | None:
        votes = {}
        for lesson in self.lessons:
            exercises = [cell for cell in lesson.master.cells if read_role(cell) == "exercise"]
            votes[lesson.name] = sum(any(looks_like(exercise, cell) for cell in cells) for exercise in exercises)
        return _find_most_voted(votes)


def look_into(file: File) -> tuple[list[SubmittedCell], list[str]]:
    """The cells of a notebook. Raises Unreadable, also for one that is very long, OSError and BadArchive."""
    data = file.read()
    if len(data) > LOOKED_INTO:
        raise Unreadable(f"the file has {len(data) / 1e6:.0f} MB")
    return read_submission_safely(data)


def _find_most_voted(votes: dict[str, int]) -> str | None:
    """The one with the most votes, if it has any and no other has as many."""
    first, second, *_ = [*Counter(votes).most_common(2), ("", 0), ("", 0)]
    return first[0] if first[1] > second[1] else None


def _holds_notebook(file: File) -> bool:
    """Whether a file of another name, .json or .txt say, has a notebook in it."""
    if Path(file.name).suffix.lower() not in ("", ".json", ".txt"):
        return False
    ends = file.peek()
    return ends.lstrip()[:1] == b"{" and b'"nbformat"' in ends


def _describe_other_file(file: str) -> str:
    if file == "timestamp.txt":
        return "when it was handed in"
    if file.lower().endswith(ARCHIVES):
        return "an archive that is not read: unpack it, or ask for a zip archive"
    return "a web page, not the notebook" if file.lower().endswith((".html", ".htm")) else ""


def _describe_strangeness(file: File) -> str:
    try:
        look_into(file)
    except Unreadable as error:
        return str(error)
    except (OSError, BadArchive) as error:
        return f"cannot be opened: {error}"
    return "neither its metadata nor its cells nor its name are a lesson's"


# --- which of several -----------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A file for a lesson, and the learner's own part of it: (cell, text) pairs; None where it cannot be read."""

    file: File
    work: tuple[tuple[str, str], ...] | None


def find_work(lesson: MasterLesson, cells: Sequence[SubmittedCell]) -> tuple[tuple[str, str], ...]:
    """The learner's own part of a notebook: answers that are not the stub's, and added cells."""
    master = lesson.master.cells
    found, _ = match_cells(lesson.master, cells)
    work = []
    for number, cell in enumerate(cells):
        given = master[found[number]] if number in found else None
        text = find_own_text(cell.source)
        if text and (
            given is None or (read_role(given) in ("exercise", "answer") and text != find_own_text(given.source))
        ):
            work.append((read_name(given) if given else "added", text))
    return tuple(work)


def choose(student: str, lesson: MasterLesson, files: Sequence[File]) -> Submission:
    """The file that is graded, of all that a student handed in for a lesson."""
    if len(files) == 1:
        return _take(student, lesson, files[0])
    candidates = []
    for file in sorted(files, key=lambda f: (f.time or datetime.max, f.name != f"{lesson.name}.ipynb", f.parts)):
        try:
            candidates.append(Candidate(file, find_work(lesson, read_submission_safely(file.read())[0])))
        except (Unreadable, OSError, BadArchive):
            candidates.append(Candidate(file, None))
    first = {candidate.work: candidate for candidate in reversed(candidates)}  # of those with the same work
    last = {candidate.work: candidate for candidate in candidates}
    written = [work for work in last if work]
    chosen = _choose_only([last[work] for work in written]) or _choose_latest([last[work] for work in written])
    if chosen is None and not written and len(first) == 1:
        chosen = candidates[0]
    chosen = chosen and first[chosen.work]  # its time counts: the same work was there by then
    if chosen is None:
        return _leave_undecided(student, lesson, candidates)
    handed = _take(student, lesson, chosen.file)
    for other in candidates:
        if other is chosen:
            continue
        if other.work is not None and other.work == chosen.work:
            other.file.settle(SAME, f"the same answers as {chosen.file.place}")
            continue
        what = "cannot be read" if other.work is None else "untouched" if not other.work else "handed in earlier"
        other.file.settle(ASIDE, f"{what}; {chosen.file.place} was taken")
        handed.flags.append(f"file: {other.file.place} was left aside: {what}")
    return handed


def _choose_only(candidates: Sequence[Candidate]) -> Candidate | None:
    return candidates[0] if len(candidates) == 1 else None


def _choose_latest(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one handed in last, where all times are known and no two are the same."""
    times = [candidate.file.time for candidate in candidates]
    if not times or None in times or len(set(times)) < len(times):
        return None
    return max(candidates, key=lambda candidate: candidate.file.time)


def _take(student: str, lesson: MasterLesson, file: File) -> Submission:
    usual = file.name == f"{lesson.name}.ipynb"
    file.settle(TAKEN, "" if usual else f"for {lesson.name}.ipynb")
    flags = [] if usual else [f"file: named {file.name}; taken for {lesson.name}.ipynb"]
    return Submission(student, lesson, file, flags + [f"file: {note}" for note in file.notes])


def _leave_undecided(student: str, lesson: MasterLesson, candidates: Sequence[Candidate]) -> Submission:
    places = ", ".join(candidate.file.place for candidate in candidates)
    reason = f"{len(candidates)} different notebooks for this lesson ({places}): leave only the one that counts"
    for candidate in candidates:
        candidate.file.settle(WAITS, f"{len(candidates)} different notebooks of {student} for {lesson.name}")
    return Submission(student, lesson, flags=[f"file: {reason}"], undecided=reason)


def hand_out(found: Delivery, lessons: Sequence[MasterLesson]) -> list[Submission]:
    """The notebooks to grade of these lessons: each is expected of everyone as soon as anyone has handed it in."""
    of: dict[tuple[str, str], list[File]] = defaultdict(list)
    keys = {lesson.key for lesson in lessons}
    for file in found.files:
        if file.lesson and file.student and file.became == UNPLACED:
            if file.lesson.key in keys:
                of[file.student, file.lesson.key].append(file)
            else:
                file.settle(ELSEWHERE, f"{file.lesson.name}: not asked for")
    given = {key for _, key in of}
    lost = defaultdict(list)
    for file in found.files:
        if file.student and _is_lost(file):
            lost[file.student].append(file)
    handed = []
    beside = NeighborFiles(found)
    for student in found.students:
        for lesson in lessons:
            files = of.get((student, lesson.key))
            if files:
                handed.append(choose(student, lesson, files))
                beside.add_to(handed[-1])
            elif lesson.key in given:
                flags = [f"file: {f.place} was handed in but not placed: {f.why}" for f in lost[student]]
                handed.append(Submission(student, lesson, None, flags))
    return handed


class NeighborFiles:
    """Knows which files of a student lie in a notebook's folder or below it."""

    def __init__(self, found: Delivery):
        self.kinds = found.kinds
        self.of_student: dict[str, list[File]] = defaultdict(list)
        for file in found.files:
            if file.student and file.became == OTHER and not file.problem:
                self.of_student[file.student].append(file)

    def add_to(self, handed: Submission) -> None:
        """Gives a notebook what lies beside it, within limits; a flag tells what is left out."""
        lying = self._find_lying(handed) if handed.file else {}
        taken, left_out = choose_beside({place: file.size for place, file in lying.items()})
        handed.beside = {place: lying[place] for place in taken}
        for file in handed.beside.values():
            file.settle(BESIDE)
        if left_out:
            handed.flags.append(f"file: {tell_left_out(left_out)}")

    def _find_lying(self, handed: Submission) -> dict[str, File]:
        """Place from the notebook's folder on → file."""
        folder = handed.file.parts[:-1]
        lying = {}
        for file in self.of_student[handed.student]:
            inside = file.parts[: len(folder)] == folder
            packed = any(self.kinds.get(file.parts[:n]) == "archive" for n in range(len(folder) + 1, len(file.parts)))
            place = (*file.parts[len(folder) : -1], file.called or file.name)
            if inside and not packed and may_go_along(place):
                lying["/".join(place)] = file
        return lying


def _is_lost(file: File) -> bool:
    """Whether work may be in a file that no lesson has got."""
    archive = file.name.lower().endswith((".zip", *ARCHIVES))
    if file.became in (UNPLACED, REFUSED):
        return file.lesson is None and (archive or may_be_notebook(file.name))
    return file.became == OTHER and archive
