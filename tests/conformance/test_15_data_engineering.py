"""Lesson 15 against datasketch (MinHash, LSH), SciPy, transformers (packed masks and rows) and exhaustive search."""

import random
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llm40  # noqa: F401  before transformers, which imports Triton
from llm40 import data

datasketch = pytest.importorskip("datasketch")


@pytest.fixture(scope="module")
def lesson(reference):
    return reference("15")


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return dict(list(data.documentation().items())[:40])


def theirs(lesson, ids: np.ndarray, seeds: np.ndarray):
    """datasketch's MinHash of the same ids under the same hash functions. It mixes what it is given with the finalizer
    of MurmurHash3; the lesson's ids look random already, so that its inverse is applied first."""
    made = datasketch.MinHash(
        num_perm=seeds.shape[1], scheme="affine64", permutations=tuple(seeds), hashfunc=lambda value: value
    )
    made.update_batch([unmixed(int(i)) for i in ids])
    return made


def unmixed(value: int) -> int:
    """The number that MurmurHash3's 64-bit finalizer turns into `value`."""
    mask = 2**64 - 1
    value ^= value >> 33
    value = value * pow(0xC4CEB9FE1A85EC53, -1, 2**64) & mask
    value ^= value >> 33
    value = value * pow(0xFF51AFD7ED558CCD, -1, 2**64) & mask
    return value ^ value >> 33


def as_halves(values: np.ndarray) -> torch.Tensor:
    """uint64 as pairs of 32-bit halves, which float64 holds exactly."""
    return torch.tensor([[int(v) >> 32, int(v) & 0xFFFFFFFF] for v in values], dtype=torch.float64)


def test_signatures(lesson, agrees, documents):
    for text in [*documents.values(), "", "one"]:
        ids = lesson.shingle_ids(text)
        agrees(
            "minhash_signature",
            "datasketch MinHash, affine64",
            as_halves(lesson.minhash_signature(ids, lesson.SEEDS)),
            as_halves(theirs(lesson, ids, lesson.SEEDS).hashvalues),
            0.0,
        )


@pytest.mark.parametrize("bands", [64, 32, 16])
def test_candidates(lesson, agrees, documents, bands):
    pages = list(documents.values())
    rng = random.Random(bands)
    for text in pages[:20]:  # relatives at all distances
        words = text.split()
        pages.append(" ".join(words[: rng.randrange(1, len(words))]))
    ids = [lesson.shingle_ids(text, 2) for text in pages]
    signatures = np.array([lesson.minhash_signature(each, lesson.SEEDS) for each in ids])
    index = datasketch.MinHashLSH(num_perm=128, params=(bands, 128 // bands))
    sketches = [theirs(lesson, each, lesson.SEEDS) for each in ids]
    for i, sketch in enumerate(sketches):
        index.insert(i, sketch)
    expected = {(i, j) for i, sketch in enumerate(sketches) for j in index.query(sketch) if i < j}
    assert len(expected) > 2
    mine = torch.zeros(len(pages), len(pages))
    wanted = mine.clone()
    for matrix, pairs in ((mine, lesson.lsh_candidates(signatures, bands)), (wanted, expected)):
        for i, j in pairs:
            matrix[i, j] = 1
    agrees("lsh_candidates", "datasketch MinHashLSH", mine, wanted, 0.0)


def test_s_curve(lesson, agrees):
    """datasketch's expected share of false positives is the S-curve's integral up to the threshold."""
    from datasketch import lsh

    for threshold, bands, rows in [(0.5, 20, 5), (0.7, 32, 4), (0.9, 8, 16), (0.3, 1, 1)]:
        s = torch.linspace(0, threshold, 100_001, dtype=torch.float64)
        mine = torch.trapezoid(lesson.s_curve(s, bands, rows), s)
        expected = torch.tensor(lsh._false_positive_probability(threshold, bands, rows), dtype=torch.float64)
        agrees("s_curve, integrated", "datasketch's false positives", mine, expected, 1e-7)


def test_clusters(lesson, agrees, documents):
    """Connected components of all pairs that are alike, by SciPy, on text that nobody made for this."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    names = list(documents)
    sets = [set(zip(*(lesson.words_of(t)[i:] for i in range(3)), strict=False)) for t in documents.values()]
    alike = [[len(a & b) >= 0.6 * len(a | b) for b in sets] for a in sets]
    _, labels = connected_components(csr_matrix(alike), directed=False)
    longest = {}
    for name, label in zip(names, labels, strict=True):
        if label not in longest or len(documents[name]) > len(documents[longest[label]]):
            longest[label] = name
    kept = lesson.deduplicate(documents, threshold=0.6, width=3)
    agrees(
        "deduplicate",
        "all pairs, SciPy's connected components",
        torch.tensor([name in kept for name in names]),
        torch.tensor([name in longest.values() for name in names]),
        0.0,
    )


def test_packing(lesson):
    """Best-fit decreasing needs at most 11/9 of the fewest rows and, here, one more: the fewest by trying all."""
    rng = random.Random(15)
    for _ in range(20):
        capacity = rng.randint(5, 20)
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(1, 6))]
        fewest = next(
            rows
            for rows in range(1, 7)
            if any(
                all(sum(n for n, r in zip(lengths, where, strict=True) if r == row) <= capacity for row in range(rows))
                for where in product(range(rows), repeat=len(lengths))
            )
        )
        rows = lesson.pack_sequences(lengths, capacity)
        assert fewest <= len(rows) <= 11 / 9 * fewest + 1


def test_document_mask(lesson, agrees):
    transformers = pytest.importorskip("transformers")
    masking = transformers.masking_utils
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [5, 3, 3, 3, 3, 3, 4, 4]])
    expected = masking.sdpa_mask(
        batch_size=2,
        q_length=8,
        kv_length=8,
        allow_is_causal_skip=False,
        mask_function=masking.and_masks(masking.causal_mask_function, masking.packed_sequence_mask_function(ids)),
    )
    agrees("document_mask", "transformers' packed_sequence_mask_function", lesson.document_mask(ids), expected, 0.0)


def test_positions_and_labels(lesson, agrees):
    transformers = pytest.importorskip("transformers")
    documents = [[11, 12, 13], [21], [31, 32, 33, 34]]
    collator = transformers.DataCollatorWithFlattening(return_position_ids=True)
    batch = collator([{"input_ids": document} for document in documents])
    tokens = torch.tensor([[token for document in documents for token in document]])
    ids = torch.tensor([[i for i, document in enumerate(documents) for _ in document]])
    positions, labels = lesson.packed_inputs(tokens, ids)
    against = "transformers DataCollatorWithFlattening"
    agrees("packed_inputs, positions", against, positions, torch.as_tensor(batch["position_ids"]), 0.0)
    shifted = F.pad(torch.as_tensor(batch["labels"])[:, 1:], (0, 1), value=-100)
    agrees("packed_inputs, labels", against, labels, shifted, 0.0)


def test_packed_row_through_a_model(lesson, agrees):
    """A packed row gives the logits and the loss that its documents give alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(15)
    config = transformers.LlamaConfig(
        vocab_size=41,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    documents = [torch.randint(1, 41, (n,)) for n in (5, 2, 7)]
    tokens = torch.cat([*documents, torch.zeros(3, dtype=torch.long)])[None]
    ids = torch.tensor([0] * 5 + [1] * 2 + [2] * 7 + [lesson.PAD] * 3)[None]
    positions, labels = lesson.packed_inputs(tokens, ids)
    mask = torch.where(lesson.document_mask(ids), 0.0, torch.finfo(torch.float32).min)
    packed = model(tokens, attention_mask=mask, position_ids=positions).logits[0]
    alone = [model(document[None]).logits[0] for document in documents]
    agrees("document_mask, positions", "transformers Llama, alone", packed[:14], torch.cat(alone), 1e-5)
    loss = F.cross_entropy(packed, labels[0], ignore_index=lesson.IGNORE)
    expected = F.cross_entropy(
        torch.cat([logits[:-1] for logits in alone]), torch.cat([document[1:] for document in documents])
    )
    agrees("packed_inputs, the loss", "transformers Llama, alone", loss, expected, 1e-5)


def test_classifier(lesson, agrees):
    """Many steps lead to where scikit-learn's solver goes, with next to no regularization, on data that overlap."""
    from sklearn.linear_model import LogisticRegression

    rng = random.Random(15)
    texts = [" ".join(rng.choices("abc", k=6)) for _ in range(300)]
    labels = torch.tensor([float(rng.random() < 0.2 + 0.5 * (text.count("a") > 2)) for text in texts])
    model = lesson.QualityClassifier(buckets=4)
    model.fit(texts, labels, steps=20_000)
    solver = LogisticRegression(C=1e9, tol=1e-10, max_iter=10_000).fit(model.features(texts).numpy(), labels.numpy())
    expected = torch.from_numpy(solver.decision_function(model.features(texts).numpy()))
    agrees("QualityClassifier, logits", "scikit-learn LogisticRegression", model(texts), expected, 1e-3)
