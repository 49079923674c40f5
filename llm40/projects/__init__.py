"""The eight projects that the course ends in, and what each must do to be accepted.

A project is a Python file of yours in `work/projects/`, such as `1_mini_gpt.py`, with the functions that `make check
PROJECT=1` asks for. It may import whatever you have written beside it. The acceptance test runs on your machine and
gives no points: it measures what you built from outside, and says what it measured.

A step of a test takes the project's module, returns a sentence with what it measured, and raises AssertionError with
what is wrong; its docstring says what it asks.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from llm40.projects import attention, engine, language, pictures, words

Step = Callable[[ModuleType], str]


@dataclass(frozen=True)
class Project:
    number: int
    name: str  # of its file, after the number
    title: str
    lessons: tuple[int, ...]  # that it starts from
    provides: str  # what its file defines
    steps: tuple[Step, ...]

    @property
    def file(self) -> str:
        return f"{self.number}_{self.name}.py"


LANGUAGE_MODEL = language.PROVIDES
PROJECTS = (
    Project(
        1, "mini_gpt", "A mini-GPT", (14, 16), LANGUAGE_MODEL,
        (language.gives_text_back, language.is_causal, language.beats_ngrams),
    ),
    Project(
        2, "flash_attention", "FlashAttention in Triton", (29,), attention.PROVIDES,
        (attention.is_exact, attention.has_gradients, attention.is_a_kernel, attention.stores_no_scores),
    ),
    Project(
        3, "llama_160m", "LLaMA-160M", (14, 16, 18), LANGUAGE_MODEL,
        (language.gives_text_back, language.has_160_million, language.is_causal, language.beats_small),
    ),
    Project(
        4, "mla_and_experts", "A sparse model with latent attention", (10, 11), LANGUAGE_MODEL + language.DECODES,
        (
            language.gives_text_back, language.is_causal, language.decodes_alike, language.has_a_small_cache,
            language.is_sparse, language.beats_ngrams,
        ),
    ),
    Project(
        5, "reasoning", "Reasoning by reinforcement learning", (23, 40), words.PROVIDES,
        (words.reverses, words.has_learned),
    ),
    Project(
        6, "vision_language", "A vision–language model", (38,), pictures.PROVIDES,
        (pictures.names_digits, pictures.answers_questions, pictures.looks),
    ),
    Project(
        7, "long_context", "A context of 32,768 tokens", (26, 29), LANGUAGE_MODEL + language.WRITES,
        (language.gives_text_back, language.reads_far, language.finds_passkeys),
    ),
    Project(
        8, "inference_engine", "An inference engine", (28, 30, 34), engine.PROVIDES,
        (
            engine.answers, engine.streams, engine.batches_alike, engine.refuses, engine.survives_leaving,
            engine.batches_faster,
        ),
    ),
)  # fmt: skip


def read_project(path: Path) -> ModuleType:
    """The module in a project's file; what is beside the file can be imported by it."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"project_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where Triton and pickle look for it
    spec.loader.exec_module(module)
    return module


def accept(project: Project, path: Path, tell: Callable[[str], None] = print) -> bool:
    """Runs the acceptance test of a project, says what each step found, and returns whether all of them passed."""
    tell(f"{project.number} {project.title}")
    try:
        module = read_project(path)
    except (Exception, SystemExit):  # a file that ends the process ends one step
        tell(f"  {path.name} cannot be imported:\n{traceback.format_exc(limit=-3)}")
        return False
    passed = [_take(step, module, tell) for step in project.steps]
    tell("accepted" if all(passed) else f"not accepted yet: {sum(passed)} of {len(passed)} steps")
    return all(passed)


def _take(step: Step, module: ModuleType, tell: Callable[[str], None]) -> bool:
    asks = step.__doc__.split("\n")[0]
    try:
        tell(f"  ✓ {asks} {step(module)}")
    except AssertionError as error:
        tell(f"  ✗ {asks} {error}")
    except (Exception, SystemExit):
        tell(f"  ✗ {asks} It ended with an error:\n{traceback.format_exc(limit=-3)}")
    else:
        return True
    return False
