"""Lesson 07 against tokenizers, tiktoken, regex and transformers: the same merges, the same ids, the same text."""

import json
import random
import sys
import unicodedata
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm40 import data

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIAL = ["<|endoftext|>", "<|pad|>"]


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("07")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    sources = sorted(data.source_code().items())
    return {
        "documentation": "\n".join(data.documentation().values())[:200_000],
        "source code": "\n".join(text for _, text in sources[:40])[:200_000],
        "Chinese": "\n".join(data.chinese_text().values()),
    }


@pytest.fixture(scope="module")
def tokenizer(lesson, texts):
    """The lesson's tokenizer, trained by the lesson on all three texts."""
    merges = lesson.train_bpe(SPECIAL[0].join(texts.values()), 256 + 2000 + len(SPECIAL), SPECIAL)
    return lesson.Tokenizer(merges, SPECIAL)


@pytest.fixture(scope="module")
def gpt2(tokenizer, lesson):
    """The same merges in the library's byte-level BPE, as a GPT-2 tokenizer.json holds them."""
    symbols = lesson.byte_symbols()

    def shown(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    vocabulary = {shown(token): i for token, i in tokenizer.ids.items()}
    library = Library(models.BPE(vocabulary, [(shown(left), shown(right)) for left, right in tokenizer.merges]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(tokenizer.special))
    return library


@pytest.fixture(scope="module")
def openai(tokenizer):
    """The same ranks in tiktoken."""
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding("lesson", pat_str=GPT2, mergeable_ranks=tokenizer.ids, special_tokens=tokenizer.special)


def same(agrees, what: str, against: str, ours: list[int], theirs: list[int]) -> None:
    """Ids must be equal, one by one; the table shows the difference 0."""
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    assert ours == theirs, f"{what}: id {first} is {ours[first : first + 3]}, {against} has {theirs[first : first + 3]}"
    agrees(what, against, torch.tensor(ours), torch.tensor(theirs), 0.0)


# --- bytes and pieces ---


def test_utf8_of_every_character(lesson):
    for code_point in range(sys.maxunicode + 1):
        if not 0xD800 <= code_point <= 0xDFFF:
            assert lesson.utf8_encode(code_point) == chr(code_point).encode(), hex(code_point)


def test_byte_table_of_gpt2(lesson):
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    assert lesson.byte_symbols() == convert.bytes_to_unicode()


def test_the_character_classes_are_those_of_the_published_pattern(lesson):
    """Every character that this Python knows, between others, is cut as by `regex` with \\p{L}, \\p{N} and \\s."""
    regex = pytest.importorskip("regex")
    pattern = regex.compile(GPT2)
    known = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    different = [c for c in known if lesson.pre_tokenize(f"a{c}1 {c}{c}x") != pattern.findall(f"a{c}1 {c}{c}x")]
    # regex may know a newer Unicode, in which a few characters have changed their category.
    assert len(different) <= 5, f"{len(different)} characters, such as {[hex(ord(c)) for c in different[:10]]}"


def test_pieces_of_real_text(lesson, texts):
    regex = pytest.importorskip("regex")
    for name, text in texts.items():
        pieces = lesson.pre_tokenize(text)
        assert pieces == regex.findall(GPT2, text) == lesson.library_pieces(text), name


# --- byte pair encoding ---


@pytest.mark.parametrize("name", ["documentation", "source code", "Chinese"])
def test_merges_of_the_library_trainer(lesson, agrees, texts, name):
    """The library numbers the characters it is given in their order: byte b goes in as the character 256 + b."""
    pieces = lesson.pre_tokenize(texts[name])
    shown = " ".join("".join(chr(256 + byte) for byte in piece.encode()) for piece in pieces)
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = [chr(256 + byte) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=256 + 3000, show_progress=False, initial_alphabet=alphabet)
    library.train_from_iterator([shown], trainer)
    model = json.loads(library.to_str())["model"]
    theirs = [tuple(bytes(ord(c) - 256 for c in part) for part in pair) for pair in model["merges"]]
    ours = lesson.train_bpe(texts[name], 256 + 3000, [])
    assert ours == theirs
    ids = lesson.Tokenizer(ours).ids
    numbers = [model["vocab"]["".join(chr(256 + byte) for byte in token)] for token in ids]
    same(agrees, f"train_bpe, 3,000 merges, {name}", "tokenizers BpeTrainer", list(ids.values()), numbers)


@pytest.mark.parametrize("name", ["documentation", "source code", "Chinese"])
def test_ids_of_real_text(lesson, agrees, texts, tokenizer, gpt2, openai, name):
    text = texts[name]
    ours = lesson.encode(text, tokenizer)
    same(agrees, f"encode, {name}", "tokenizers BPE", ours, gpt2.encode(text).ids)
    same(agrees, f"encode, {name}", "tiktoken Encoding", ours, openai.encode_ordinary(text))
    assert lesson.decode(ours, tokenizer) == text == openai.decode(ours)


def test_text_that_was_not_trained_on(lesson, agrees, tokenizer, gpt2, openai):
    text = "\n".join(text for _, text in sorted(data.source_code().items())[200:240])[:300_000]
    ours = lesson.encode(text, tokenizer)
    same(agrees, "encode, unseen source code", "tokenizers BPE", ours, gpt2.encode(text).ids)
    same(agrees, "encode, unseen source code", "tiktoken Encoding", ours, openai.encode_ordinary(text))


def test_special_tokens(lesson, agrees, tokenizer, gpt2, openai):
    text = "one<|endoftext|>two <|pad|><|pad|> three<|endoftext|"
    ours = lesson.encode(text, tokenizer)
    same(agrees, "encode, special tokens", "tokenizers BPE", ours, gpt2.encode(text).ids)
    same(agrees, "encode, special tokens", "tiktoken Encoding", ours, openai.encode(text, allowed_special="all"))
    ordinary = lesson.encode(text, tokenizer, special=False)
    same(agrees, "encode, special=False", "tiktoken encode_ordinary", ordinary, openai.encode_ordinary(text))
    assert lesson.decode(ours, tokenizer) == lesson.decode(ordinary, tokenizer) == openai.decode(ours) == text


def characters() -> st.SearchStrategy[str]:
    """Mostly the characters on which the pieces' borders depend, sometimes any that this Python knows."""
    awkward = st.sampled_from(
        [*"  \n\t\r'", *"saetnorSTm0129_.,!", *"éßжקहあ한中文的", "\u0301", "½", "\u00a0", "\u2028", "🙂", "\u200d"]
    )
    return st.one_of(awkward, st.characters(exclude_categories=("Cn", "Cs", "Co")))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(text=st.text(characters(), max_size=40))
def test_any_text_round_trips(reference, tokenizer, gpt2, openai, text):
    lesson = reference("07")
    ids = lesson.encode(text, tokenizer)
    assert lesson.decode(ids, tokenizer) == text
    assert ids == gpt2.encode(text).ids
    # tiktoken joins any neighbors whose bytes are a token, GPT-2 only pairs that were trained: the bytes are the same,
    # and the ids as long as the vocabulary has no token that another pair spells as well.
    assert b"".join(openai.decode_tokens_bytes(openai.encode_ordinary(text))) == text.encode()


@settings(max_examples=400, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 256 + 2000 + len(SPECIAL) - 1), max_size=20))
def test_any_ids_have_a_text(reference, tokenizer, openai, ids):
    assert reference("07").decode(ids, tokenizer) == openai.decode(ids)


def test_random_text_in_tiktoken(lesson, agrees, tokenizer, openai):
    draw = random.Random(7)
    signs = [*"  \n\t'", *"eaoithsnrdlu", *"EST019_.,()", *"éжあ한中文的", "\u0301", "½", "🙂"]
    text = "".join(draw.choices(signs, k=100_000))
    ours, theirs = lesson.encode(text, tokenizer), openai.encode_ordinary(text)
    same(agrees, "encode, random characters", "tiktoken Encoding", ours, theirs)


# --- WordPiece and Unigram ---


def test_wordpiece(lesson, agrees, texts):
    pre = pre_tokenizers.Whitespace()
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer = pre
    trainer = trainers.WordPieceTrainer(vocab_size=3000, show_progress=False, special_tokens=["[UNK]"])
    library.train_from_iterator([texts["documentation"]], trainer)
    vocabulary = library.get_vocab()
    text = texts["source code"][:50_000] + texts["Chinese"][:5_000]
    ours = [t for word, _ in pre.pre_tokenize_str(text) for t in lesson.wordpiece_tokenize(word, set(vocabulary))]
    theirs = library.encode(text).ids
    assert ours.count("[UNK]") > 50  # the branch is reached
    same(agrees, "wordpiece_tokenize", "tokenizers WordPiece", [vocabulary[t] for t in ours], theirs)


@pytest.fixture(scope="module")
def unigram(texts):
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=2000, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>")
    library.train_from_iterator([texts["documentation"]], trainer)
    return library


def test_unigram(lesson, agrees, texts, unigram):
    log_probs = dict(json.loads(unigram.to_str())["model"]["vocab"])
    del log_probs["<unk>"]
    known = set("".join(log_probs))
    words = [w for w in texts["documentation"].split() if set(w) <= known][:5000]
    scores, best = [], []
    for word in words:
        tokens, score = lesson.unigram_viterbi("▁" + word, log_probs)
        theirs = unigram.encode(word).tokens
        assert "".join(tokens) == "".join(theirs) == "▁" + word
        scores.append(score)
        best.append(sum(log_probs[token] for token in theirs))
    agrees("unigram_viterbi, score", "tokenizers Unigram", torch.tensor(scores), torch.tensor(best), 1e-12)


def test_unigram_expected_counts(lesson, agrees, texts, unigram):
    """Against the derivative of log Z, by central differences, with a trained table."""
    log_probs = dict(json.loads(unigram.to_str())["model"]["vocab"])
    del log_probs["<unk>"]
    text = "▁" + "▁".join(texts["documentation"].split()[:40])
    text = "".join(c for c in text if c in log_probs)
    _, counts = lesson.unigram_expected_counts(text, log_probs)
    largest = sorted(counts, key=counts.get)[-25:]
    step, slopes = 1e-5, []
    for token in largest:
        up, down = ({**log_probs, token: log_probs[token] + sign * step} for sign in (1, -1))
        difference = lesson.unigram_expected_counts(text, up)[0] - lesson.unigram_expected_counts(text, down)[0]
        slopes.append(difference / (2 * step))
    ours = torch.tensor([counts[token] for token in largest], dtype=torch.float64)
    theirs = torch.tensor(slopes, dtype=torch.float64)
    agrees("unigram_expected_counts", "central differences of log Z", ours, theirs, 1e-7)


def test_a_cut_is_a_sum_over_borders(lesson):
    """log Z of a short text is the log of the sum over all of its segmentations, the definition."""
    log_probs = {"a": -1.5, "b": -2.0, "ab": -2.5, "ba": -2.2, "aba": -3.0}
    text = "abababba"
    total = torch.tensor(0.0, dtype=torch.float64)
    for chosen in range(2 ** (len(text) - 1)):
        cuts = [0, *(i + 1 for i in range(len(text) - 1) if chosen >> i & 1), len(text)]
        tokens = [text[i:j] for i, j in pairwise(cuts)]
        if all(token in log_probs for token in tokens):
            total += torch.tensor(sum(log_probs[token] for token in tokens), dtype=torch.float64).exp()
    assert lesson.unigram_expected_counts(text, log_probs)[0] == pytest.approx(float(total.log()), rel=1e-12)
