"""Every file that was handed in, in folders and in zip archives, as it lies: nothing is unpacked, moved or changed."""

import errno
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from autograder.grading import archives
from autograder.grading.archives import BadArchive, Budget
from autograder.grading.late import read_time
from autograder.grading.masters import MasterLesson

SKIPPED = ("__MACOSX", "__pycache__", "lost+found")  # and names that begin with a dot: not looked into
CHECKPOINTS = ".ipynb_checkpoints"
MAX_BYTES = 100_000_000  # read of a file; one that is longer is no notebook that anybody wrote
DEEPEST = 30  # folders in each other: no learning platform makes half as many
PEEKED = 4096  # bytes at either end of a file: where the notebook's metadata stands

# What became of a file.
TAKEN, SAME, ASIDE, WAITS = "taken", "the same as another", "left aside", "waits for a person"
UNPLACED, ELSEWHERE, OTHER = "not placed", "another lesson", "not a notebook"
BESIDE = "with a notebook"  # it lies in the kernel's folder when that is graded
REFUSED, IGNORED = "refused", "ignored"


@dataclass(eq=False)
class File:
    """A file that was handed in, and what became of it."""

    parts: tuple[str, ...]  # of its place under SUBMITTED; archives are parts as folders are
    read: Callable[[], bytes]  # raises OSError, or BadArchive for a damaged member of an archive
    peek: Callable[[], bytes]  # its beginning and its end
    stamp: str | None = None  # the outermost timestamp.txt, as it stands: one further in may be the learner's own
    size: int = 0  # bytes
    problem: str = ""  # why it is not looked into
    student: str | None = None
    called: str = ""  # by its owner, where a platform has put something before its name
    notes: list[str] = field(default_factory=list)  # what a person should know about its place
    lesson: MasterLesson | None = None
    became: str = UNPLACED
    why: str = ""
    time: datetime | None = None  # when it was handed in, UTC without a zone; None where nobody knows

    @property
    def place(self) -> str:
        return "/".join(self.parts)

    @property
    def name(self) -> str:
        return self.parts[-1]

    def settle(self, became: str, why: str = "") -> None:
        self.became, self.why = became, why

    def read_stamp(self) -> None:
        """Sets when it was handed in; what is not certain is noted, and costs nothing."""
        if self.stamp is None:
            return
        self.time, trouble = read_time(self.stamp)
        if trouble:
            self.notes.append(f"handed in at {self.stamp.strip()[:40]!r}: {trouble}; taken as handed in on time")


@dataclass
class Delivery:
    """All that lies under SUBMITTED."""

    files: list[File] = field(default_factory=list)
    kinds: dict[tuple[str, ...], str] = field(default_factory=dict)  # place → "folder" or "archive"
    students: list[str] = field(default_factory=list)  # also those whose folder is empty

    def select_student(self, student: str) -> "Delivery":
        """One student's part of it."""
        return Delivery([f for f in self.files if f.student == student], self.kinds, [student])


def decode_name(part: str) -> str:
    """A name from the file system as text, in one normal form: macOS and Linux write é differently."""
    return normalize_name(archives.as_text(os.fsencode(part)))


def normalize_name(part: str) -> str:
    """A name in one normal form, its control characters replaced: it is printed in terminals."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" else c for c in unicodedata.normalize("NFC", part))


def decode_names(names: list[str]) -> dict[str, str]:
    """The names of one folder as texts; two that differ in their normal form only (réné, twice) stay two."""
    texts = {name: decode_name(name) for name in names}
    alike = Counter(texts.values())
    return {name: archives.as_text(os.fsencode(name)) if alike[text] > 1 else text for name, text in texts.items()}


def may_be_notebook(file: str) -> bool:
    """Whether a file may be a notebook, by its name: browsers add to it (`09_x.ipynb.txt`), systems use capitals."""
    return ".ipynb" in file.lower()


def find_files(submitted: Path) -> Delivery:
    """All files under a folder, or in a zip archive."""
    found = Delivery()
    if submitted.is_file():
        _add_archive(found, (decode_name(submitted.name),), lambda: submitted, None, Budget(), 1)
    else:
        _add_folder(found, submitted)
    found.files.sort(key=lambda file: file.parts)
    return found


def _add_folder(found: Delivery, root: Path) -> None:
    waiting: list[tuple[Path, tuple[str, ...], str | None]] = [(root, (), None)]
    while waiting:
        folder, parts, stamp = waiting.pop()
        if len(parts) > DEEPEST:
            found.files.append(_make_unread(parts, f"more than {DEEPEST} folders in each other: not looked into"))
            continue
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            found.files.append(_make_unread((*parts, ""), f"cannot be opened: {error.strerror}"))
            continue
        written = folder / "timestamp.txt"
        if stamp is None and parts and written.is_file() and not written.is_symlink():
            stamp = _read_ends(written).decode("utf-8", "replace")
        texts = decode_names([path.name for path in entries])
        for path in entries:
            place = (*parts, texts[path.name])
            if path.is_symlink():
                found.files.append(_make_unread(place, "a link, not a file of its own"))
            elif path.is_dir():
                if path.name == CHECKPOINTS or not (path.name.startswith(".") or path.name in SKIPPED):
                    found.kinds[place] = "folder"
                    waiting.append((path, place, stamp))
            elif not path.is_file():
                found.files.append(_make_unread(place, "not an ordinary file"))
            elif path.suffix.lower() == ".zip":
                _add_archive(found, place, lambda path=path: path, stamp, Budget(), 1)
            else:
                read, peek = (lambda path=path: _read_file(path)), (lambda path=path: _read_ends(path))
                found.files.append(File(place, read, peek, stamp, path.stat().st_size))


def _read_file(path: Path) -> bytes:
    """A file, or so much of it that one sees that it is too long."""
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def _read_ends(path: Path) -> bytes:
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(PEEKED)
        file.seek(max(file.tell(), size - PEEKED))
        return head + file.read(PEEKED)


def _make_unread(place: tuple[str, ...], problem: str) -> File:
    return File(place, bytes, bytes, problem=problem)


def _add_archive(
    found: Delivery, place: tuple[str, ...], opened: archives.Opener, stamp: str | None, budget: Budget, depth: int
) -> None:
    found.kinds[place] = "archive"
    try:
        members = list(archives.read_members(opened, budget))
    except BadArchive as error:
        found.files.append(_make_unread(place, str(error)))
        return
    stamps = {member.parts[:-1]: member for member in members if member.parts[-1:] == ("timestamp.txt",)}
    for member in members:
        inside = tuple(normalize_name(part) for part in member.parts) or ("?",)
        here = (*place, *inside)
        hidden = any(part in SKIPPED or (part.startswith(".") and part != CHECKPOINTS) for part in inside[:-1])
        if hidden and not member.problem:
            continue
        for depth_here in range(len(place) + 1, len(here)):
            found.kinds.setdefault(here[:depth_here], "folder")
        outermost = next((stamps[inside[:n]] for n in range(len(inside)) if inside[:n] in stamps), None)
        mark = _read_member_stamp(outermost) if outermost and stamp is None else stamp
        if member.problem:
            found.files.append(_make_unread(here, member.problem))
        elif not here[-1].lower().endswith(".zip"):
            found.files.append(File(here, member.read, member.read, mark, member.size))
        elif depth < archives.MAX_DEPTH:
            _add_archive(found, here, lambda member=member: io.BytesIO(member.read()), mark, budget, depth + 1)
        else:
            found.files.append(_make_unread(here, "an archive inside an archive inside an archive"))


def _read_member_stamp(member: archives.Member) -> str | None:
    try:
        return None if member.problem else member.read()[:PEEKED].decode("utf-8", "replace")
    except BadArchive:
        return None


def is_out_of_room(error: BaseException | None) -> bool:
    """Whether something failed because a disk is full, or a quota is used up; SQLite says so in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "disk is full" in str(error) or "disk I/O error" in str(error)
