"""What a vision–language model of a project must do: name what it sees, answer about it, and look before it speaks."""

from types import ModuleType

import torch
from torch import Tensor

from llm40 import data

PROVIDES = '''\
def answer(images, question):
    """What your model writes about each image: a list of texts. images (n, 8, 8) float32 in [0, 1], handwritten digits
    as llm40.data.digits() has them; question is a text, "" asks for a caption. Train on the first 1,500 digits only."""
'''
TRAINING = 1500
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _held_out() -> tuple[Tensor, Tensor]:
    images, labels = data.digits()
    return images[TRAINING:], labels[TRAINING:]


def _count_named(texts: list[str], labels: Tensor) -> float:
    """The share of texts that name their digit and no other."""
    assert len(texts) == len(labels), f"It wrote {len(texts)} texts for {len(labels)} images."
    named = [{name for name in NAMES if name in text.lower().replace(".", " ").split()} for text in texts]
    return sum(found == {NAMES[label]} for found, label in zip(named, labels.tolist(), strict=True)) / len(labels)


def names_digits(project: ModuleType) -> str:
    """Its captions name the digit, as a word, in nine of ten held-out images."""
    images, labels = _held_out()
    share = _count_named(project.answer(images, ""), labels)
    assert share >= 0.9, f"{share:.0%} of {len(labels)} do."
    return f"{share:.0%} of {len(labels)}."


def answers_questions(project: ModuleType) -> str:
    """It answers "Is the digit even?" and "Is the digit greater than four?" in nine of ten."""
    images, labels = _held_out()
    truths = {"Is the digit even?": labels % 2 == 0, "Is the digit greater than four?": labels > 4}
    shares = []
    for question, truth in truths.items():
        texts = project.answer(images, question)
        assert len(texts) == len(images), f"It wrote {len(texts)} texts for {len(images)} images."
        said = [text.strip().lower().rstrip(".") for text in texts]
        wanted = ["yes" if yes else "no" for yes in truth.tolist()]
        share = sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)
        assert share >= 0.9, f"{share:.0%} of the answers to {question!r} are right; it wrote {texts[0]!r} first."
        shares.append(share)
    return f"{' and '.join(f'{share:.0%}' for share in shares)}."


def looks(project: ModuleType) -> str:
    """What it says depends on the image alone: alone or in a batch, and not on images without a digit."""
    images, labels = _held_out()
    together = project.answer(images[:20], "")
    alone = [project.answer(image[None], "")[0] for image in images[:20]]
    assert together == alone, "It describes an image otherwise when others are beside it."
    blank = _count_named(project.answer(torch.zeros_like(images), ""), labels)
    assert blank <= 0.3, f"Given blank images, it names {blank:.0%} of the digits that were there."
    return f"Given blank images, it names {blank:.0%} of the digits that were there."
