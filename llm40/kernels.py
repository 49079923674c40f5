"""Triton, or what stands in for it where it does not exist: `from llm40 import triton, tl`.

Triton has wheels for Linux only. Elsewhere kernels can be defined, and the first launch says what is missing, so that
every other cell of a lesson runs.
"""

import functools
from typing import Any

from llm40 import profile  # decides, before Triton is imported, whether its interpreter runs the kernels

MISSING = (
    "Triton exists for Linux only: do this exercise on Linux, in WSL2 or on a GPU machine. "
    "The other exercises of this lesson work here."
)


class Absent:
    """A kernel, or a name of Triton's, on a machine without Triton: it can be named, and raises when it is called."""

    def __init__(self, what: str) -> None:
        self.__name__ = what

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("_"):  # what Python and IPython ask every object for
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __getitem__(self, grid: Any) -> "Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(MISSING)

    def __repr__(self) -> str:
        return f"<{self.__name__}: not installed here>"


class Language(Absent):
    """In place of triton.language."""

    class constexpr:
        """A constant of a kernel; as an annotation, a parameter that is one."""

        def __init__(self, value: Any) -> None:
            self.value = value


class Triton(Absent):
    """In place of triton: decorators that leave a kernel which can't be launched, and the arithmetic for grids."""

    def __init__(self, what: str, language: Language) -> None:
        super().__init__(what)
        self.language = language

    def jit(self, fn: Any = None, **options: Any) -> Any:
        return (lambda fn: Absent(fn.__name__)) if fn is None else Absent(fn.__name__)

    def autotune(self, *args: Any, **options: Any) -> Any:
        return lambda kernel: kernel

    heuristics = autotune

    class Config:
        """A choice of block sizes, which nobody will try here."""

        def __init__(self, kwargs: dict[str, Any], **options: Any) -> None:
            self.kwargs = kwargs

    @staticmethod
    def cdiv(x: int, y: int) -> int:
        return -(-x // y)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        return 1 << max(n - 1, 0).bit_length()


def _patch_language_once() -> None:
    """Triton's interpreter puts its own functions into triton.language at a launch, and again at each call of a jitted
    helper, tl.sum too: a sixth of a lesson's time. What is patched already is left as it is."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton, which does it another way
        return
    patch, language = interpreter._patch_lang, triton.language

    def patch_once(fn: Any) -> Any:
        used = [value for value in fn.__globals__.values() if value is language or value is language.core]
        if used and not any(language.core.is_builtin(module.load) for module in used):
            return interpreter._LangPatchScope()  # nothing to restore
        return patch(fn)

    interpreter._patch_lang = patch_once


if profile.has_triton:
    import triton
    import triton.language as tl

    if profile.interpret:
        _patch_language_once()
else:
    tl = Language("triton.language")
    triton = Triton("triton", tl)


@functools.cache
def autotuned(kernel: Any, configs: tuple[Any, ...], key: tuple[str, ...], bucket: tuple[int, ...] = ()) -> Any:
    """The kernel with Triton's autotuner: the fastest of `configs` (triton.Config) for each value of the arguments
    `key`, and for each `bucket`: sizes rounded up, say, where each new size is not worth a measurement.

    The interpreter, where speed means nothing, takes the first of them. The same kernel, configurations and bucket give
    the same autotuned kernel, which remembers what it measured.
    """
    return triton.autotune(list(configs[:1] if profile.interpret else configs), key=list(key))(kernel)
