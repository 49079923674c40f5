"""What a model trained by reinforcement must do: answer right, and better than before."""

import math
from types import ModuleType

import numpy as np

PROVIDES = '''\
def before(words):
    """What your model wrote for each word before reinforcement: the list of words it took for the reversed ones."""

def after(words):
    """The same after reinforcement. Both write with a language model, which reads the word as text."""
'''
WORDS, LETTERS = 200, (3, 5)
FLOOR = 0.6


def _draw_words() -> list[str]:
    """Other words than anyone has trained on: of random letters, no two alike."""
    rng = np.random.default_rng(20_260_131)
    words = dict.fromkeys(
        "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(LETTERS[0], LETTERS[1] + 1)))
        for _ in range(2 * WORDS)
    )
    return [word for word in words if word != word[::-1]][:WORDS]


def _judge(written: list[str], words: list[str], who: str) -> np.ndarray:
    assert len(written) == len(words), f"{who} gave {len(written)} answers to {len(words)} words."
    return np.array([answer == word[::-1] for answer, word in zip(written, words, strict=True)])


def reverses(project: ModuleType) -> str:
    """It writes words of three to five letters backwards."""
    words = _draw_words()
    right = _judge(project.after(words), words, "after")
    assert right.mean() >= FLOOR, f"{right.mean():.0%} of {len(words)} are right, {FLOOR:.0%} are asked."
    return f"{right.mean():.0%} of {len(words)} are right."


def has_learned(project: ModuleType) -> str:
    """It is better than before reinforcement, and not by luck."""
    words = _draw_words()
    before, after = (_judge(answer(words), words, answer.__name__) for answer in (project.before, project.after))
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    # If reinforcement had changed nothing, each word that changed would be won or lost like a coin's fall.
    luck = sum(math.comb(won + lost, k) for k in range(won, won + lost + 1)) / 2 ** (won + lost)
    told = f"{before.mean():.0%} before, {after.mean():.0%} after; {won} words won, {lost} lost"
    assert luck < 0.01, f"{told}: by luck with probability {luck:.2g}."
    return f"{told}."
