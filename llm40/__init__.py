"""What the lessons import: `profile`, `data`, `plot`, `checks` and the small `models`.

Import `llm40` (or any part of it) before `triton`: on a machine without a GPU it switches Triton to its interpreter.
"""

from llm40 import profile as profile
