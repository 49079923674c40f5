"""Real data that is already on the machine: no network is needed, and none is used unless you call `fetch`.

| call                        | what                                    | licence             | size (Python 3.11)     |
|-----------------------------|-----------------------------------------|---------------------|------------------------|
| `documentation()`           | Python's language reference, English    | PSF 2.0 (code 0BSD) | 79 documents, 0.5 MB   |
| `source_code()`             | Python's standard library without tests | PSF 2.0             | 606 files, 9.9 MB      |
| `word_vectors()`            | vectors of the documentation's words    | PSF 2.0             | 1,200 × 48             |
| `dates()`, `translations()` | dates and names in two languages (CLDR) | Unicode 3.0         | as many pairs as asked |
| `chinese_text()`            | names and dated sentences (CLDR)        | Unicode 3.0         | 5 documents, 0.1 MB    |
| `digits()`                  | handwritten digits, 8×8 grey (UCI)      | CC BY 4.0           | 1,797 images           |
| `pictures()`                | two color photographs                   | CC BY 2.0           | 427×640 each           |
| `fetch(name)`               | a public set, over the network          | see `PUBLIC`        | see `PUBLIC`           |

The documentation and the sources are those of the Python that runs this: another version differs a little in text,
but not in how `split` assigns a document. The functions say where each set comes from.
"""

import datetime
import hashlib
import math
import os
import random
import re
import sysconfig
import tokenize
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

# Not prose or programs written by people, or not the library proper: tests, bundled wheels, tables that were generated,
# files that hold paths of this machine, and pydoc_data, which is `documentation()` once more.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_bundled",
    "encodings",
    "pydoc_data",
    "__phello__",
}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "_sysconfig_vars")


class MissingDataError(RuntimeError):
    """A data set that should be on this machine is not; the message says what to install."""


# --- English and Python ---------------------------------------------------------------------------------------------


@cache
def _documentation() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MissingDataError(
            "this Python has no module pydoc_data.topics (the language reference behind `help('for')`): its "
            "distribution left it out. On Debian and Ubuntu: apt install libpython3-stdlib. Elsewhere "
            "use a full Python 3.11 or newer from python.org, conda or pyenv."
        ) from None
    return {name: topics[name] for name in sorted(topics)}


def documentation() -> dict[str, str]:
    """Python's language reference by topic, {"assert": "The assert statement…", …}: English prose with short code.

    Source: `pydoc_data.topics`, the text behind `help("assert")`. Licence: PSF License 2.0, its code samples also 0BSD.
    Some topics repeat others ("if" is a section of "compound"): see `deduplicate`. Raises MissingDataError where the
    distribution leaves the module out.
    """
    return dict(_documentation())


@cache
def _source_code() -> dict[str, str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)
        )
        for name in sorted(names):
            if not name.endswith(".py") or name.startswith(_SKIPPED_PREFIXES):
                continue
            path = Path(folder, name)
            with tokenize.open(path) as file:  # honors the file's own coding line
                files[path.relative_to(root).as_posix()] = file.read()
    if len(files) < 100:
        raise MissingDataError(
            f"{root} holds {len(files)} Python source files; a full standard library has more than 500. This Python "
            "ships compiled files only: use one from python.org, conda, pyenv or your system's package manager."
        )
    return files


def source_code() -> dict[str, str]:
    """Python's standard library, {"asyncio/queues.py": text, …}, from the interpreter that runs this.

    Licence: PSF License 2.0. Without tests and generated tables (encodings). Raises MissingDataError where the
    distribution ships no sources.
    """
    return dict(_source_code())


# --- splitting ------------------------------------------------------------------------------------------------------


def _shingles(text: str, width: int = 8) -> set[int]:
    """Hashes of all runs of `width` words: two documents share a shingle when they share that phrase."""
    words = text.split()
    return {hash(run) for run in zip(*(words[i:] for i in range(width)), strict=False)}


def deduplicate(documents: dict[str, str], threshold: float = 0.5) -> dict[str, str]:
    """The documents without those of which more than `threshold` of the 8-word phrases stand in documents already kept.

    Longest documents are kept first, so a section that also stands inside a chapter goes, and the chapter stays. Order
    is preserved. A document of fewer than 8 words is compared as a whole.
    """
    seen: set[int] = set()
    kept = set()
    for name in sorted(documents, key=lambda name: (-len(documents[name]), name)):
        text = documents[name]
        phrases = _shingles(text) or {hash(text)}
        if len(phrases & seen) <= threshold * len(phrases):
            kept.add(name)
            seen |= phrases
    return {name: text for name, text in documents.items() if name in kept}


# One of many that would do: with it about 5% of the bytes, not only of the names, of both the documentation and the
# sources are held out, and no single file dominates them.
_SALT = "llm40/40/"


def split(documents: dict[str, str], held_out: float = 0.05) -> tuple[dict[str, str], dict[str, str]]:
    """(training, held out) documents; about the share `held_out` of them is held out.

    A document's side depends only on a hash of its name: it stays when other documents come or go, when its text
    changes, and from one Python version to the next. What names cannot see is text that stands in two documents:
    `deduplicate` first, and `scrub` the training part.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is a share between 0 and 1, not {held_out!r}")
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name, text in documents.items():
        fraction = int.from_bytes(hashlib.sha256((_SALT + name).encode()).digest()[:8]) / 2**64
        parts[fraction < held_out][name] = text
    return parts


def scrub(training: dict[str, str], held_out: dict[str, str]) -> dict[str, str]:
    """The training documents without the paragraphs most of whose 8-word phrases stand in a held-out document.

    Documentation and licence notices quote one another. What is left in both is shorter than a paragraph.
    """
    secret = set().union(*(_shingles(text) for text in held_out.values()))

    def clean(text: str) -> str:
        paragraphs = text.split("\n\n")
        phrases = [_shingles(paragraph) for paragraph in paragraphs]
        return "\n\n".join(
            paragraph
            for paragraph, these in zip(paragraphs, phrases, strict=True)
            if not these or len(these & secret) <= 0.5 * len(these)
        )

    return {name: clean(text) for name, text in training.items()}


# --- words ----------------------------------------------------------------------------------------------------------


def word_counts(texts: dict[str, str]):
    """The names of the texts, and log(1 + count) of every word in each of them, float32 (texts, words).

    Words are runs of letters and underscores in lower case; columns stand in alphabetical order. A text that stands
    under two names counts once, under the second.
    """
    import torch

    names = {text: name for name, text in texts.items()}
    counts = [Counter(re.findall(r"[a-z_]+", text.lower())) for text in names]
    column = {word: i for i, word in enumerate(sorted(set().union(*counts)))}
    vectors = torch.zeros(len(names), len(column))
    for row, count in enumerate(counts):
        for word, times in count.items():
            vectors[row, column[word]] = math.log1p(times)
    return list(names.values()), vectors


@cache
def _word_vectors(vocabulary: int, width: int, window: int):
    import torch

    words = re.findall(r"[a-z_]+|[.,;:()]", "\n".join(_documentation().values()).lower())
    index = {word: i for i, (word, _) in enumerate(Counter(words).most_common(vocabulary))}
    ids = torch.tensor([index.get(word, -1) for word in words])
    counts = torch.zeros(vocabulary * vocabulary)
    for distance in range(1, window + 1):
        left, right = ids[:-distance], ids[distance:]
        known = (left >= 0) & (right >= 0)
        counts += torch.bincount(left[known] * vocabulary + right[known], minlength=vocabulary**2)
    counts = counts.view(vocabulary, vocabulary)
    together = (counts + counts.T) / (2 * counts.sum())
    alone = together.sum(1)
    information = torch.log(together / (alone[:, None] * alone)).clamp(min=0).nan_to_num(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, _ = torch.svd_lowrank(information, q=width)
    vectors = u * s.sqrt()
    return index, vectors / vectors.pow(2).mean(1, keepdim=True).sqrt()


def word_vectors(vocabulary: int = 1200, width: int = 48, window: int = 4):
    """The documentation's most frequent words, {word: row}, and a vector for each: float32 (vocabulary, width).

    Two words are close where they keep the same company: positive pointwise mutual information of words up to `window`
    apart, reduced to `width` dimensions by an SVD (Levy & Goldberg 2014, arXiv:1402.3722, without its shift). Each
    vector has mean square 1. Needs no training.
    """
    index, vectors = _word_vectors(vocabulary, width, window)
    return dict(index), vectors.clone()


# --- languages ------------------------------------------------------------------------------------------------------


def _locale(language: str):
    from babel import Locale, UnknownLocaleError

    try:
        return Locale.parse(language)
    except (UnknownLocaleError, ValueError) as error:
        raise ValueError(
            f"CLDR knows no language {language!r}: use a code such as 'en', 'zh', 'zh_Hant', 'de' or 'ja'"
        ) from error


def dates(source: str = "en", target: str = "iso", count: int = 10_000, seed: int = 0) -> list[tuple[str, str]]:
    """`count` pairs of one day written two ways: ("Tuesday, March 5, 2024", "2024-03-05").

    `source` and `target` are CLDR languages ("en", "zh", "de", …) or "iso" (YYYY-MM-DD). A language's date is written
    in one of its three longer styles, the same for both sides of a pair. Days are drawn from 1950 to 2049; the same
    seed gives the same days.
    Source: Unicode CLDR through Babel, Unicode License 3.0.
    """
    from babel.dates import format_date

    languages = [language if language == "iso" else _locale(language) for language in (source, target)]
    rng = random.Random(seed)
    first = datetime.date(1950, 1, 1)
    days = (datetime.date(2050, 1, 1) - first).days

    def pair():
        day = first + datetime.timedelta(days=rng.randrange(days))
        style = rng.choice(("full", "long", "medium"))
        return tuple(
            day.isoformat() if language == "iso" else format_date(day, format=style, locale=language)
            for language in languages
        )

    return [pair() for _ in range(count)]


_NAMES = ("languages", "territories", "scripts", "currencies")


def translations(source: str = "en", target: str = "zh") -> list[tuple[str, str]]:
    """Pairs of names in two languages: ("Abkhazian", "阿布哈西亚语"), …, for every language, territory, script and
    currency that CLDR names in both; about 1,400 for "en" and "zh". Sorted, without repeats and without
    pairs whose sides are alike.

    Source: Unicode CLDR through Babel, Unicode License 3.0.
    """
    left, right = _locale(source), _locale(target)
    pairs = set()
    for kind in _NAMES:
        ours, theirs = getattr(left, kind), getattr(right, kind)
        pairs.update((ours[code], theirs[code]) for code in ours.keys() & theirs.keys())
    return sorted(pair for pair in pairs if pair[0] != pair[1])


@cache
def _chinese_text() -> dict[str, str]:
    chinese = _locale("zh")
    names = {kind: [name for _, name in sorted(getattr(chinese, kind).items())] for kind in _NAMES}
    entries = [
        (name, label)
        for kind, label in zip(_NAMES, ("语言", "地区", "文字", "货币"), strict=True)
        for name in names[kind]
    ]
    days = dates("zh", count=len(entries))
    sentences = [f"{name}的{label}名称收录于{day}。" for (day, _), (name, label) in zip(days, entries, strict=True)]
    documents = {kind: "\n".join(lines) for kind, lines in names.items()}
    return documents | {"sentences": "\n".join(sentences)}


def chinese_text() -> dict[str, str]:
    """Chinese text, simplified script, in five documents of one entry a line: the names of languages, territories,
    scripts and currencies, and made-up sentences with a name and a date in each ("阿法尔语的语言名称收录于2019年…").

    For what bytes and tokens do with a script of thousands of characters; it is no literature. Source: Unicode CLDR
    through Babel, Unicode License 3.0; the sentences are composed here from CLDR names and dates.
    """
    return dict(_chinese_text())


# --- pictures -------------------------------------------------------------------------------------------------------


def digits():
    """Handwritten digits: images `(1797, 8, 8)` float32 in [0, 1], 1 is full ink; labels `(1797,)` int64, 0 to 9.

    Source: test part of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak 1998, UCI Machine
    Learning Repository, CC BY 4.0, as shipped with scikit-learn. Fresh tensors at each call.
    """
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 8, 8), torch.tensor(labels, dtype=torch.int64)


def pictures():
    """Two color photographs, {"china": …, "flower": …}, each `(3, 427, 640)` float32 in [0, 1], channels RGB.

    Source: shipped with scikit-learn; CC BY 2.0, by flickr users danielbuechele (china) and vultilion (flower).
    """
    import torch
    from sklearn.datasets import load_sample_images

    sample = load_sample_images()
    return {
        Path(name).stem: torch.tensor(image / 255, dtype=torch.float32).permute(2, 0, 1)
        for name, image in zip(sample.filenames, sample.images, strict=True)
    }


# --- over the network, only when asked ------------------------------------------------------------------------------

# name → (address, SHA-256, licence)
PUBLIC = {
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "public domain text, 1.1 MB",
    ),
}


def cache_folder() -> Path:
    """Where fetched files are kept: $LLM40_CACHE, or `llm40` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or (
        os.environ.get("LOCALAPPDATA") if os.name == "nt" else Path.home() / ".cache"
    )
    return Path(os.environ.get("LLM40_CACHE") or Path(base or Path.home()) / "llm40")


def fetch(name: str) -> Path:
    """Downloads the public set `name` (see `PUBLIC`) once, checks its SHA-256 and returns the file's path.

    The only function of the course that uses the network; nothing calls it for you. Raises ConnectionError where the
    address cannot be reached and ValueError where the file is not the one expected; neither leaves a file behind.
    """
    if name not in PUBLIC:
        raise ValueError(f"no public set is called {name!r}; known: {', '.join(sorted(PUBLIC))}")
    import pooch

    address, expected, _ = PUBLIC[name]
    path = cache_folder() / f"{name}-{expected[:8]}.txt"
    if path.exists() and pooch.file_hash(str(path)) != expected:
        warnings.warn(f"{path} is damaged and is downloaded again", stacklevel=2)
    pooch.get_logger().setLevel("WARNING")  # it tells of every download
    download = pooch.HTTPDownloader(timeout=30)
    try:
        pooch.retrieve(address, f"sha256:{expected}", path.name, path.parent, downloader=download)
    except OSError as error:  # of the network, too
        raise ConnectionError(
            f"cannot download {name!r} from {address}: {error}. With the file from elsewhere, save it as {path}."
        ) from error
    except ValueError as error:  # its checksum
        raise ValueError(f"{address} gave another file than expected: {error}. Nothing was saved.") from error
    return path
