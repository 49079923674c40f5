"""The folder work/: copies of the lessons, made current without a word of the learner's being lost.

A copy is replaced in one step by a file that is complete, after its old text has been put into work/.earlier. Whatever
happens in between (a full disk, a kill, no power), the copy is the old one or the new one.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from autograder import catalog
from autograder.catalog import UsageError
from autograder.grading.beside import choose_beside, may_go_along
from autograder.grading.rebuild import Unreadable
from autograder.layout import Layout, write
from autograder.learner.merge import merge
from autograder.lesson import read_text
from autograder.notebooks import dumps, is_as_built, read_seal

PATIENCE = 30.0  # seconds that a command waits for another to end its writing
PAGES = ("index", "notation")
SETTLED = 2.0  # seconds after which a file that is no notebook is not one that is being saved
SAVING = 0.2  # seconds that a save takes


class Busy(UsageError):
    """Another command is writing in work/."""


class Work:
    """A learner's folder of a project."""

    def __init__(self, root: Path):
        self.layout = Layout(root)
        self.folder = self.layout.work

    def find_copy(self, key: str) -> Path:
        """The learner's copy of a lesson (`<stage>/<lesson>`), or of a page."""
        return self.folder / f"{key}.ipynb"

    def find_base(self, key: str) -> Path:
        return self.folder / ".course" / f"{key}.ipynb"

    def show_path(self, path: Path) -> str:
        return path.relative_to(self.layout.root).as_posix()

    def list_lessons(self) -> list[str]:
        """The lessons of the course that are written, in order."""
        return [entry.key for entry in catalog.LESSONS if (self.layout.course / f"{entry.key}.ipynb").is_file()]

    def select(self, lesson: str | None, stage: str | None = None) -> list[str]:
        """The written lessons that someone means; UsageError where there is none."""
        if not self.list_lessons():
            raise UsageError(f"there are no lessons in {self.layout.course}: call this in the course's folder")
        return catalog.select_keys(self.list_lessons(), lesson or None, stage or None)

    def read_course(self, key: str) -> str:
        """A lesson or page of the course. UsageError where the file is damaged: by git's marks of a conflict, say."""
        path = self.layout.course / f"{key}.ipynb"
        text = read_text(path)
        try:
            notebook = json.loads(text)
            notebook["cells"], key in PAGES or notebook["metadata"]["llm40"]["minutes"]
        except (ValueError, KeyError, TypeError) as error:
            here = self.show_path(path)
            raise UsageError(f"{here} is damaged: keep what is yours of it, then: git checkout -- {here}") from error
        return text

    def read_base(self, key: str, copy: bytes) -> str | None:
        """The lesson that a copy was made from, where it is known."""
        path = self.find_base(key)
        text = read_text(path) if path.is_file() else None
        return text if text and _read_own_seal(text) and _read_own_seal(text) == _read_own_seal(copy) else None

    def read_copy(self, key: str) -> bytes | None:
        """A learner's copy, None where there is none. JupyterLab empties a file before it writes: that is awaited."""
        path = self.find_copy(key)
        while path.exists():
            data = path.read_bytes()
            if _is_json(data) or abs(time.time() - path.stat().st_mtime) > SETTLED:
                return data
            time.sleep(0.05)
        return None

    def find_beside(self, key: str) -> tuple[list[str], list[str]]:
        """Places of files beside a copy, from its folder on: those that go along, and those that are too many."""
        folder = self.find_copy(key).parent
        sizes = {}
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            if may_go_along(parts) and path.is_file() and not path.is_symlink():
                sizes["/".join(parts)] = path.stat().st_size
        return choose_beside(sizes)

    @contextmanager
    def lock(self, patience: float = PATIENCE) -> Iterator[None]:
        """Only one command at a time writes here; the system ends the lock of one that is killed."""
        self.folder.mkdir(exist_ok=True)
        with open(self.folder / ".lock", "a+b") as file:
            end = time.monotonic() + patience
            while not _try_lock(file.fileno()):
                if time.monotonic() > end:
                    raise Busy(f"another command has been writing in work/ for {patience:g} s: let it end first")
                time.sleep(0.1)
            yield

    # --- copies -----------------------------------------------------------------------------------------------

    def make_current(self, keys: Iterable[str]) -> list[str]:
        """Lays copies that are not there and brings the others up to date; a line for each that has something to tell.

        Call it with the lock. What cannot be written or read stays as it is, and its line says so.
        """
        lines = []
        for key in keys:
            try:
                lines.append(self._make_current(key))
            except (OSError, Unreadable) as error:
                why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                lines.append(f"{self.show_path(self.find_copy(key))}: left as it is: {why}")
        return [line for line in lines if line]

    def _make_current(self, key: str) -> str:
        course = self.read_course(key)
        path = self.find_copy(key)
        for _ in range(5):
            data = self.read_copy(key)
            if data is None or not data.strip():  # left by a crash of the machine: nobody writes it
                self._write_with_base(key, course, course)
                return ""
            if _read_own_seal(data) and _read_own_seal(data) == _read_own_seal(course):
                self._write_base(key, course)
                return ""
            merged, changes = merge(course, data, self.read_base(key, data))
            text = dumps(merged)
            earlier = self.keep_earlier(key, data)
            if path.read_bytes() != data:  # JupyterLab has just saved it
                continue
            with self._watching(path) as old:
                self._write_with_base(key, text, course)
            if old and old[0] != data:  # it saved into the old file while the new one was put there
                write(path.resolve(), old[0])
                continue
            return f"{self.show_path(path)} is up to date again: {changes}; as it was: {self.show_path(earlier)}"
        return f"{self.show_path(path)}: left as it is: it changes all the time; close it and try again"

    @contextmanager
    def _watching(self, path: Path) -> Iterator[list[bytes]]:
        """Holds on to the file that is about to be replaced; then the list has what it holds a moment later."""
        found: list[bytes] = []
        held = path.resolve().with_name(f".{path.name}.{os.getpid()}.old")
        try:
            os.link(path.resolve(), held)
        except OSError:  # no links on this file system
            yield found
            return
        try:
            yield found
            time.sleep(SAVING)
            found.append(held.read_bytes())
        finally:
            held.unlink(missing_ok=True)

    def _write_with_base(self, key: str, text: str, course: str) -> None:
        write(self.find_copy(key).resolve(), text)  # where the copy is a link, the link stays
        self._write_base(key, course)

    def _write_base(self, key: str, course: str) -> None:
        path = self.find_base(key)
        if not is_as_built(course):  # somebody's answers are in it, which are not the course's
            path.unlink(missing_ok=True)
        elif not path.is_file() or read_text(path) != course:
            write(path, course)

    def keep_earlier(self, key: str, data: bytes) -> Path:
        """Puts what a file held beside it, under its time; once, however often it is tried."""
        folder = (self.folder / ".earlier" / key).parent
        name = key.rsplit("/", 1)[-1]
        for path in sorted(folder.glob(f"{name}.*.ipynb"), reverse=True):
            if path.read_bytes() == data:
                return path
        stem = f"{name}.{datetime.now():%Y-%m-%dT%H-%M-%S}"
        path = folder / f"{stem}.ipynb"
        number = 1
        while path.exists():
            number += 1
            path = folder / f"{stem}-{number}.ipynb"
        write(path, data)
        return path

    def write_page(self, name: str, text: str) -> None:
        """A page of the course's; where a learner has written in it, that is kept beside it."""
        path = self.find_copy(name)
        data = path.read_bytes() if path.is_file() else b""
        if data.replace(b"\r\n", b"\n") == text.encode():
            return
        if data.strip() and not is_as_built(data):
            self.keep_earlier(name, data)
        write(path, text)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _read_own_seal(notebook: str | bytes) -> str:
    """The seal in a notebook's text: of the build that it was made from."""
    try:
        return read_seal(json.loads(notebook))
    except (ValueError, RecursionError):
        return ""


def _try_lock(file: int) -> bool:
    """Whether this process has the lock now; also true on file systems that know no locks."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, 0, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
