"""What the lessons import: `profile`, `data`, `plot`, `checks`, the small `models`, and `triton` with `tl`.

Import `llm40` (or any part of it) before `triton`: on a machine without a GPU it switches Triton to its interpreter.
`from llm40 import triton, tl` does both, and gives a stand-in where Triton does not exist (see `kernels`).
"""

from typing import Any

from llm40 import profile as profile


def __getattr__(name: str) -> Any:
    if name in ("triton", "tl"):  # loaded only where they are asked for: Triton takes half a second
        from llm40 import kernels

        return getattr(kernels, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
