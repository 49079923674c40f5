"""Zip archives as learners and platforms make them: read in memory, within limits, and never unpacked to disk.

Member names are text whatever wrote them: UTF-8 where the archive says so, else UTF-8 or GB18030 by trial (Chinese
Windows writes that and does not say so).
"""

import io
import lzma
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_DEPTH = 3  # archives inside archives
MAX_MEMBERS = 20_000  # of one archive and all inside it
MAX_BYTES = 4_000_000_000  # unpacked, of one archive and all inside it
MAX_MEMBER_BYTES = 100_000_000  # unpacked, of one member
MAX_RATIO = 200  # unpacked to packed, of a member of more than BOMB_BYTES: notebooks with pictures have about 1.3
BOMB_BYTES = 10_000_000
SAFE_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)

Opener = Callable[[], io.IOBase | Path]


class BadArchive(ValueError):
    """An archive, or a member of one, that cannot be read; the message says why."""


@dataclass
class Budget:
    """How much may still be read of an archive and of those inside it."""

    members: int = MAX_MEMBERS
    bytes: int = MAX_BYTES


@dataclass(frozen=True)
class Member:
    """A file in an archive; `problem` says why it is not read, where it is not."""

    parts: tuple[str, ...]
    read: Callable[[], bytes]
    problem: str = ""
    size: int = 0  # bytes, unpacked


def as_text(name: bytes) -> str:
    """A file's name as text: UTF-8, else GB18030, else with its strange bytes written out as `\\xff`."""
    for encoding in ("utf-8", "gb18030"):
        try:
            return name.decode(encoding)
        except UnicodeDecodeError:
            continue
    return name.decode("ascii", "backslashreplace")


def read_members(opened: Opener, budget: Budget) -> Iterator[Member]:
    """The files of the archive that `opened` opens, in the archive's order. Raises BadArchive."""
    try:
        with zipfile.ZipFile(opened()) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise BadArchive(f"not a zip archive that can be read ({error})") from None
    budget.members -= len(infos)
    if budget.members < 0:
        raise BadArchive(f"more than {MAX_MEMBERS:,} files in one archive")
    for info in infos:
        parts = _split_parts(_read_name(info))
        problem = _find_problem(info, parts)
        if not problem:
            budget.bytes -= info.file_size
            if budget.bytes < 0:
                raise BadArchive(f"more than {MAX_BYTES / 1e9:.0f} GB when unpacked")
        yield Member(parts, lambda info=info: _read_member(opened, info), problem, info.file_size)


def _read_name(info: zipfile.ZipInfo) -> str:
    """The member's name; zipfile reads names of no stated encoding as cp437, which loses no byte."""
    if info.flag_bits & 0x800 or info.filename != zipfile.ZipInfo(info.orig_filename).filename:
        return info.filename  # UTF-8; from Python 3.12 on zipfile takes the Unicode Path field too, as WinRAR writes it
    return as_text(info.filename.encode("cp437"))


def _split_parts(name: str) -> tuple[str, ...]:
    """The folders and the file; backslashes, which some programs on Windows write, separate too."""
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _find_problem(info: zipfile.ZipInfo, parts: tuple[str, ...]) -> str:
    if not parts or ".." in parts or info.filename.startswith(("/", "\\")) or parts[0][1:2] == ":":
        return "its name leads out of the archive"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "a link, not a file of its own"
    if info.flag_bits & 1:
        return "encrypted: the archive has a password"
    if info.compress_type not in SAFE_METHODS:
        return "packed by a method that is not supported: pack it again as an ordinary zip archive"
    if info.file_size > MAX_MEMBER_BYTES:
        return f"unpacks to {info.file_size / 1e6:,.0f} MB, more than the {MAX_MEMBER_BYTES / 1e6:.0f} MB that are read"
    ratio = info.file_size // max(1, info.compress_size)
    if info.file_size > BOMB_BYTES and ratio > MAX_RATIO:
        return f"unpacks to {ratio:,} times its size, as a zip bomb does"
    return ""


def _read_member(opened: Opener, info: zipfile.ZipInfo) -> bytes:
    """A member's bytes, at most as many as the archive says. Raises BadArchive."""
    try:
        with zipfile.ZipFile(opened()) as archive:
            return archive.read(info)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, ValueError, RuntimeError, EOFError) as error:
        raise BadArchive(f"damaged in its archive ({error})") from None
