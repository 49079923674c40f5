"""Whose each file is, by the folders and archives around it and by the names that platforms give."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from autograder.grading.files import Delivery, File, may_be_notebook

WRAPPERS = ("course", "submitted", "submissions", "work", "inbound")  # folders that are no student's
MOODLE = re.compile(r"(?P<name>.+?)_(?P<number>\d+)_assignsubmission_[a-z]+(?:_(?P<rest>.*))?", re.DOTALL)
CANVAS = re.compile(r"(?P<name>.+?)_(?P<late>LATE_)?(?P<number>\d+)_\d+_(?P<rest>.+)", re.DOTALL)
EXCHANGE = re.compile(
    r"(?P<name>.+?)(?:\+[^+]+)?"
    r"\+(?P<time>\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d+)?(?: ?[+-]\d\d:?\d\d| ?[A-Za-z]+)?)(?:\+.*)?"
)
LONGEST = 240  # bytes of a student's name: with `.html` behind it, it is still a file's name
BLIND = "participant"  # Moodle's name for everyone while marking is blind


@dataclass
class Owner:
    """The owner of an entry, by its name; `number` is the learning platform's for the person or the hand-in."""

    name: str
    number: str = ""
    time: str = ""
    late: bool = False
    rest: str = ""  # of the entry's name, as its owner gave it


class Placing:
    """Finds out whose each file is, by the folders and archives around it and by the names that platforms give."""

    def __init__(self, found: Delivery, wrappers: Collection[str]):
        self.found = found
        self.wrappers = wrappers
        self.inside: dict[tuple[str, ...], list[File]] = defaultdict(list)  # container → files, however deep
        entries: dict[tuple[str, ...], set[str]] = defaultdict(set)  # container → what lies directly in it
        for file in found.files:
            for depth in range(len(file.parts)):
                self.inside[file.parts[:depth]].append(file)
                if depth < len(file.parts) - 1 or may_be_notebook(file.name):
                    entries[file.parts[:depth]].add(file.parts[depth])
        for place in found.kinds:
            entries[place[:-1]].add(place[-1])
        self.entries = entries
        self.canvas = {place for place in entries if self._is_canvas(place)}
        self.namesakes = self._find_namesakes()
        # Where some stand in folders of their own, a platform's name inside such a folder is its owner's invention.
        notebooks = [file.parts for file in found.files if may_be_notebook(file.name)]
        self.throughout = all(any(self._find_owner(p[:n]) for n in range(1, len(p) + 1) if p[n - 1]) for p in notebooks)
        self.tops: dict[tuple[str, ...], list[str]] = {}
        archives = [place for place, kind in found.kinds.items() if kind == "archive"]
        self.first_tops = Counter(top for place in archives for top in self._list_tops(place)[:1])

    def place(self) -> None:
        students, used = set(), set()
        for file in self.found.files:
            file.student, owner = self._find_student(file.parts)
            if file.student and len(file.student.encode()) > LONGEST:
                file.problem, file.student = "the name of the student's folder is too long", None
            if file.student:
                students.add(file.student)
                used.add(file.parts[0])
            if owner and owner.rest and file.name.endswith(f"_{owner.rest}"):
                file.called = owner.rest
            if owner and owner.time and not file.stamp:
                file.stamp = owner.time
            if owner and owner.late:
                file.notes.append("handed in late, says Canvas, but not when: nothing is taken off for it")
        for place in sorted(self.found.kinds, key=len, reverse=True):  # the folders of those who handed in nothing
            who, owner = self._find_student((*place, ""))
            fits = who and len(who.encode()) <= LONGEST
            if fits and (owner or (len(place) == 1 and place[0] not in used)):
                students.add(who)
                used.add(place[0])
        self.found.students = sorted(students)

    # --- platforms --------------------------------------------------------------------------------------------

    def _is_canvas(self, place: tuple[str, ...]) -> bool:
        """Whether all that lies in a folder is named as Canvas does it, so that chance is out of the question."""
        matches = [CANVAS.fullmatch(entry) for entry in self.entries[place]]
        numbers = {found["number"] for found in matches if found}
        alone = not place or place[-1] in self.wrappers
        return bool(matches) and all(matches) and (alone or len(numbers) > 1)

    def _find_owner(self, place: tuple[str, ...]) -> Owner | None:
        """The owner of an entry that a platform has named; None for others."""
        kind, entry = self.found.kinds.get(place, "file"), place[-1]
        exchanged = EXCHANGE.fullmatch(entry) if kind == "folder" else None
        if exchanged:
            return Owner(exchanged["name"], time=exchanged["time"])
        moodle = MOODLE.fullmatch(entry)
        if moodle:
            return Owner(moodle["name"], moodle["number"], rest=moodle["rest"] or "")
        loose = len(place) == 1 and kind != "folder"  # no folder says whose an entry of SUBMITTED itself is
        canvas = CANVAS.fullmatch(entry) if loose or place[:-1] in self.canvas else None
        if not canvas:
            return None
        return Owner(canvas["name"], canvas["number"], late=bool(canvas["late"]), rest=canvas["rest"])

    def _find_namesakes(self) -> set[tuple[str, ...]]:
        """(container, name) pairs that belong to several people: their numbers must tell them apart."""
        numbers: dict[tuple, set[str]] = defaultdict(set)
        for place, names in self.entries.items():
            for entry in names:
                owner = self._find_owner((*place, entry)) if entry else None
                if owner and owner.number:
                    numbers[*place, owner.name].add(owner.number)
        return {key for key, those in numbers.items() if len(those) > 1}

    # --- folders ----------------------------------------------------------------------------------------------

    def _find_student(self, parts: tuple[str, ...]) -> tuple[str | None, Owner | None]:
        deepest = len(parts) if self.throughout else min(len(parts), self._skip_wrappers(parts, 0) + 1)
        for depth in range(1, deepest + 1):
            owner = self._find_owner(parts[:depth]) if parts[depth - 1] else None
            if owner:
                namesake = (*parts[: depth - 1], owner.name) in self.namesakes or owner.name.lower() == BLIND
                return (f"{owner.name}_{owner.number}" if namesake else owner.name), owner
        container = parts[: self._skip_wrappers(parts, 0) + 1]
        kind = self.found.kinds.get(container)
        if kind is None or container[-1].startswith("."):
            return None, None
        inner = self._find_inner_student(container, kind, parts)
        if inner:
            return inner, None
        stem = _remove_copy_mark(Path(container[-1]).stem if kind == "archive" else container[-1])
        return (None if kind == "archive" and stem in self.wrappers else stem), None

    def _is_wrapper(self, place: tuple[str, ...]) -> bool:
        return self.found.kinds.get(place) == "folder" and place[-1] in self.wrappers

    def _list_tops(self, container: tuple[str, ...]) -> list[str]:
        """The first folders below a container, where below each stands a stage's folder: <student>/<stage>/….

        Empty where anything in the container lies otherwise.
        """
        if container not in self.tops:
            self.tops[container] = self._find_tops(container)
        return self.tops[container]

    def _find_tops(self, container: tuple[str, ...]) -> list[str]:
        tops = {}
        for file in self.inside[container]:
            if not may_be_notebook(file.name):
                continue
            depth = self._skip_wrappers(file.parts, len(container))
            rest = file.parts[depth:]
            staged = len(rest) > 2 and self._is_wrapper(file.parts[: depth + 2])
            if len(rest) < 2 or not (staged or self.found.kinds.get(file.parts[: depth + 1]) == "archive"):
                return []
            tops[rest[0]] = None
        return list(tops)

    def _skip_wrappers(self, parts: tuple[str, ...], depth: int) -> int:
        """The depth of the first part, from `depth` on, that is no wrapper."""
        while depth < len(parts) - 1 and self._is_wrapper(parts[: depth + 1]):
            depth += 1
        return depth

    def _find_inner_student(self, container: tuple[str, ...], kind: str, parts: tuple[str, ...]) -> str | None:
        """The student whose folder lies inside an archive, or inside the only folder of all."""
        tops = self._list_tops(container)
        if not tops:
            return None
        depth = self._skip_wrappers(parts, len(container))
        top = parts[depth] if depth < len(parts) - 1 else tops[0]
        if kind == "folder":
            only = len(self.entries[container[:-1]]) == 1 and len(tops) > 1
            return top if only and self.found.kinds.get((*parts[:depth], top)) == "folder" else None
        stem = Path(container[-1]).stem
        agree = stem in self.wrappers or stem.casefold().startswith(top.casefold())
        if len(tops) > 1 or agree or self.first_tops[top] == 1:
            return _remove_copy_mark(Path(top).stem if top.lower().endswith(".zip") else top)
        return None


def _remove_copy_mark(stem: str) -> str:
    """`ada (1)` → `ada`: what browsers make of a second download."""
    return re.sub(r"\s*\(\d+\)$", "", stem) or stem
