"""Says whether the course can be set up on this machine, before pip runs: any Python 3 runs it, it imports no package.

PyTorch, which every lesson needs, has no wheel for other machines than these; pip's own error names a version, not why.
"""

import platform
import sys

OLDEST, NEWEST = (3, 11), (3, 13)
MACHINES = {
    "linux": ("x86_64", "amd64", "aarch64", "arm64"),
    "win32": ("amd64", "x86_64"),
    "darwin": ("arm64",),
}
MACOS = 14  # the oldest that PyTorch's wheels are made for
NEEDED = (
    "LLM40 needs PyTorch, which exists for Linux (x86-64 and Arm, with glibc), Windows (x86-64), "
    f"and macOS {MACOS} or newer on Apple silicon"
)


def find_trouble(
    system: str, machine: str, version: tuple, macos: str = "", libc: str = "glibc", bits: int = 64
) -> str:
    """Why the course cannot be set up, in a sentence; empty where it can."""
    if not OLDEST <= version[:2] <= NEWEST:
        return f"LLM40 needs Python 3.{OLDEST[1]} to 3.{NEWEST[1]}; this is {'.'.join(map(str, version[:3]))}"
    if bits != 64:
        return f"{NEEDED}; this Python is a {bits}-bit one: install a 64-bit Python"
    if machine.lower() not in MACHINES.get(system, ()):
        here = {"darwin": "a Mac with an Intel processor (or a Python for one)", "win32": "Windows on " + machine}
        return f"{NEEDED}; this is {here.get(system, f'{system} on {machine}')}. Colab or Kaggle run it in a browser"
    if system == "darwin" and macos and int(macos.split(".")[0]) < MACOS:
        return f"{NEEDED}; this is macOS {macos}: update it, or use Colab or Kaggle in a browser"
    if system == "linux" and libc != "glibc":
        return f"{NEEDED}; this Linux has no glibc (Alpine, say): use a container of Debian or Ubuntu"
    return ""


if __name__ == "__main__":
    bits = 64 if sys.maxsize > 2**32 else 32
    libc = platform.libc_ver()[0] or "none"
    sys.exit(
        find_trouble(sys.platform, platform.machine(), sys.version_info[:3], platform.mac_ver()[0], libc, bits) or None
    )
