"""The project's folders, and a way to write a file whole."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from autograder import catalog
from autograder.catalog import Entry


def find_project() -> Path:
    """The checkout that this package lies in; for an installed package the current folder, if that is a checkout."""
    around = Path(__file__).resolve().parent.parent
    here = any((Path.cwd() / name).is_dir() for name in ("solutions", "course"))
    return Path.cwd() if here and not (around / "course").is_dir() else around


ROOT = find_project()


@dataclass(frozen=True)
class Layout:
    """A project's folders: the real project's, or a test's."""

    root: Path

    @property
    def solutions(self) -> Path:
        return self.root / "solutions"

    @property
    def course(self) -> Path:
        return self.root / "course"

    @property
    def masters(self) -> Path:
        return self.root / "build" / "source"

    @property
    def learners(self) -> Path:
        """The learners' notebooks as they were generated last; course/ is a copy of these."""
        return self.root / "build" / "release"

    @property
    def work(self) -> Path:
        """A learner's own: their copies of the lessons."""
        return self.root / "work"

    @property
    def stamps(self) -> Path:
        return self.root / "build" / "stamps.json"

    def find_source(self, entry: Entry) -> Path:
        return self.solutions / f"{entry.key}.py"

    def list_written(self) -> list[Entry]:
        """The lessons that have a source."""
        return [entry for entry in catalog.LESSONS if self.find_source(entry).is_file()]


def write(path: Path, data: str | bytes, durable: bool = True) -> None:
    """Write a file whole or not at all, also where the disk is full; text with `\\n` line ends.

    durable: the power may fail, too. What can be made again need not wait for the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")  # short: `path`'s own name may be as long as names get
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
