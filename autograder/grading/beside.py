"""Files that lie beside a notebook: modules and data that its cells read. They go along with it, within limits.

`make grade` lays them in the kernel's folder, `make check` and `make submit` take the same ones.
"""

from collections.abc import Mapping, Sequence

MAX_FILES, MAX_BYTES = 100, 10_000_000  # of one notebook's, all together
# Not for the notebook's cells: times and pages of other programs, other notebooks, archives, what editors leave.
LEFT = (".ipynb", ".html", ".htm", ".pdf", ".zip", ".pyc", "~", ".bak", ".orig", ".tmp", ".swp", ".part", ".crdownload")
TIMES = "timestamp.txt"  # nbgrader's


def may_go_along(parts: Sequence[str]) -> bool:
    """Whether a file may, by its name: `parts` are its place from the notebook's folder on."""
    hidden = any(part.startswith(".") or part in ("__pycache__", "__MACOSX", "..") for part in parts)
    return bool(parts) and not hidden and parts[-1] != TIMES and not parts[-1].lower().endswith(LEFT)


def choose_beside(sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Splits files (place → bytes) into those that go along, the nearest and smallest first, and the others."""
    taken, left_out, room = [], [], MAX_BYTES
    for place in sorted(sizes, key=lambda place: (place.count("/"), sizes[place], place)):
        if len(taken) < MAX_FILES and sizes[place] <= room:
            taken.append(place)
            room -= sizes[place]
        else:
            left_out.append(place)
    return taken, left_out


def tell_left_out(places: Sequence[str]) -> str:
    """One line for all of them."""
    shown = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
    return f"left out of what lies beside the notebook: {shown}; {MAX_FILES} files and {MAX_BYTES // 10**6} MB go along"
