# Right and wrong answers to the exercises of lesson 15: see CONTRIBUTING.md.

# %% wrong="quality_signals" because="words without their punctuation"
- words = text.split()
+ words = words_of(text)

# %% wrong="quality_signals" because="empty lines count"
- lines = [line.strip() for line in text.splitlines() if line.strip()]
+ lines = [line.strip() for line in text.splitlines()]

# %% wrong="quality_signals" because="lines with the white space before them"
- lines = [line.strip() for line in text.splitlines() if line.strip()]
+ lines = [line for line in text.splitlines() if line.strip()]

# %% wrong="quality_signals" because="lines end in a line feed only"
- lines = [line.strip() for line in text.splitlines() if line.strip()]
+ lines = [line.strip() for line in text.split("\n") if line.strip()]

# %% wrong="quality_signals" because="words with a #, not occurrences of it"
- "hashes": text.count("#") / count,
+ "hashes": sum(word == "#" for word in words) / count,

# %% wrong="quality_signals" because="only three full stops are an ellipsis"
- "ellipses": (text.count("...") + text.count("…")) / count,
+ "ellipses": text.count("...") / count,

# %% wrong="quality_signals" because="words that end in an ellipsis"
- "ellipses": (text.count("...") + text.count("…")) / count,
+ "ellipses": sum(word.endswith(("...", "…")) for word in words) / count,

# %% wrong="quality_signals" because="lines of bullets only"
- "bullet_lines": sum(line.startswith(BULLETS) for line in lines) / rows,
+ "bullet_lines": sum(line in BULLETS for line in lines) / rows,

# %% wrong="quality_signals" because="words made of letters only"
- "letter_words": sum(any(c.isalpha() for c in word) for word in words) / count,
+ "letter_words": sum(word.isalpha() for word in words) / count,

# %% wrong="quality_signals" because="letters of the English alphabet only"
- "letter_words": sum(any(c.isalpha() for c in word) for word in words) / count,
+ "letter_words": sum(any(c in "abcxyztuvw" for c in word) for word in words) / count,

# %% wrong="quality_signals" because="every stop word counts, not every different one"
- "stop_words": len(set(STOP_WORDS).intersection(words_of(text))),
+ "stop_words": sum(word in STOP_WORDS for word in words_of(text)),

# %% wrong="quality_signals" because="stop words with capitals are missed"
- "stop_words": len(set(STOP_WORDS).intersection(words_of(text))),
+ "stop_words": len(set(STOP_WORDS).intersection(words)),

# %% wrong="quality_signals" because="the mean length of the characters between spaces, spaces included"
- "mean_word_length": sum(map(len, words)) / count,
+ "mean_word_length": len(text) / count,

# %% wrong="quality_signals" because="an empty text divides by zero"
- count, rows = max(len(words), 1), max(len(lines), 1)
+ count, rows = len(words), len(lines)

# %% right="quality_signals" because="regular expressions and loops"
def quality_signals(text):
    words, found = text.split(), {}
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    found["words"] = float(len(words))
    found["mean_word_length"] = len("".join(words)) / len(words) if words else 0.0
    found["hashes"] = len(re.findall("#", text)) / len(words) if words else 0.0
    found["ellipses"] = len(re.findall(r"\.\.\.|…", text)) / len(words) if words else 0.0
    bullets = ends = letters = 0
    for line in lines:
        bullets += line[0] in BULLETS
        ends += line[-1] == "…" or line[-3:] == "..."
    for word in words:
        letters += bool(re.search(r"[^\W\d_]", word))
    found["bullet_lines"] = bullets / len(lines) if lines else 0.0
    found["ellipsis_lines"] = ends / len(lines) if lines else 0.0
    found["letter_words"] = letters / len(words) if words else 0.0
    present = words_of(text)
    found["stop_words"] = float(sum(stop in present for stop in STOP_WORDS))
    return found

# %% right="quality_signals" because="NumPy's means"
def quality_signals(text):
    words = text.split()
    if not words:
        return dict.fromkeys(LIMITS, 0)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    mean = lambda values: float(np.mean(values))
    return {
        "stop_words": len({w for w in words_of(text) if w in STOP_WORDS}),
        "letter_words": mean([any(map(str.isalpha, w)) for w in words]),
        "ellipsis_lines": mean([line.endswith("...") or line.endswith("…") for line in lines]),
        "bullet_lines": mean([line.startswith(BULLETS) for line in lines]),
        "ellipses": text.replace("...", "…").count("…") / len(words),
        "hashes": text.count("#") / len(words),
        "mean_word_length": mean([len(w) for w in words]),
        "words": len(words),
    }

# %% wrong="keep" because="the smallest allowed value is refused"
- return all(low <= signals[name] <= high for name, (low, high) in limits.items())
+ return all(low < signals[name] <= high for name, (low, high) in limits.items())

# %% wrong="keep" because="the largest allowed value is refused"
- return all(low <= signals[name] <= high for name, (low, high) in limits.items())
+ return all(low <= signals[name] < high for name, (low, high) in limits.items())

# %% wrong="keep" because="one rule that is kept is enough"
- return all(low <= signals[name] <= high for name, (low, high) in limits.items())
+ return any(low <= signals[name] <= high for name, (low, high) in limits.items())

# %% wrong="keep" because="the limits that are handed over are ignored"
- return all(low <= signals[name] <= high for name, (low, high) in limits.items())
+ return all(low <= signals[name] <= high for name, (low, high) in LIMITS.items())

# %% wrong="keep" because="a missing signal is fine"
- return all(low <= signals[name] <= high for name, (low, high) in limits.items())
+ return all(low <= signals.get(name, low) <= high for name, (low, high) in limits.items())

# %% wrong="keep" because="every signal must have a limit"
- return all(low <= signals[name] <= high for name, (low, high) in limits.items())
+ return all(limits[name][0] <= value <= limits[name][1] for name, value in signals.items())

# %% wrong="keep" because="only the upper limits"
- return all(low <= signals[name] <= high for name, (low, high) in limits.items())
+ return all(signals[name] <= high for name, (low, high) in limits.items())

# %% right="keep" because="a loop"
def keep(signals, limits=LIMITS):
    for name in limits:
        low, high = limits[name]
        value = signals[name]
        if value < low or value > high:
            return False
    return True

# %% right="keep" because="broken rules are counted"
def keep(signals, limits=LIMITS):
    broken = [name for name, (low, high) in limits.items() if not low <= signals[name] <= high]
    return not broken

# %% wrong="repetition_signals" because="the first occurrence counts too"
- if part in seen:
-     again.append(part)
+ if parts.count(part) > 1:
+     again.append(part)

# %% wrong="repetition_signals" because="lines are compared in lower case"
- parts = [part.strip() for part in parts if part.strip()]
+ parts = [part.strip().lower() for part in parts if part.strip()]

# %% wrong="repetition_signals" because="overlapping occurrences count twice"
- return sum(sizes[i] for i in {start + j for start in starts for j in range(n)})
+ return sum(sizes[start + j] for start in starts for j in range(n))

# %% wrong="repetition_signals" because="an n-gram that occurs once is the most common one"
- common = [covered(starts, n) for starts in places.values() if len(starts) > 1]
+ common = [covered(starts, n) for starts in places.values()]

# %% wrong="repetition_signals" because="the most frequent n-gram, the first of several"
- common = [covered(starts, n) for starts in places.values() if len(starts) > 1]
- signals[f"top_{n}"] = max(common, default=0) / total
+ common = max(places.values(), key=len, default=[])
+ signals[f"top_{n}"] = covered(common, n) / total if len(common) > 1 else 0

# %% wrong="repetition_signals" because="long phrases with their first occurrence"
- later = [start for starts in places.values() for start in starts[1:]]
+ later = [start for starts in places.values() for start in starts if len(starts) > 1]

# %% wrong="repetition_signals" because="shares of words, not of characters"
- sizes = [len(word) for word in words]
+ sizes = [1 for word in words]

# %% wrong="repetition_signals" because="paragraphs only where the blank line is empty"
- signals["paragraphs"], signals["paragraph_characters"] = repeated(re.split(r"\n\s*\n", text))
+ signals["paragraphs"], signals["paragraph_characters"] = repeated(text.split("\n\n"))

# %% wrong="repetition_signals" because="words with their punctuation and capitals"
- words = words_of(text)
+ words = text.split()

# %% wrong="repetition_signals" because="characters of all words counted with the spaces between them"
- total = max(sum(sizes), 1)
+ total = max(len(" ".join(words)), 1)

# %% wrong="repetition_signals" because="9-grams are the longest"
- for n in range(2, 11):
+ signals["repeated_10"] = 0
+ for n in range(2, 10):

# %% right="repetition_signals" because="a flag for every word"
def repetition_signals(text):
    def twice(parts):
        parts = list(filter(None, map(str.strip, parts)))
        late = [p for i, p in enumerate(parts) if p in set(parts[:i])]
        if not parts:
            return 0.0, 0.0
        return len(late) / len(parts), sum(map(len, late)) / sum(map(len, parts))

    found = {}
    found["lines"], found["line_characters"] = twice(text.splitlines())
    pair = twice(re.split(r"\n\s*\n", text))
    found["paragraphs"], found["paragraph_characters"] = pair
    words = words_of(text)
    letters = np.array([len(w) for w in words], dtype=float)
    for n in range(2, 5):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        best = 0.0
        for gram, times in Counter(grams).items():
            if times == 1:
                continue
            flags = np.zeros(len(words), dtype=bool)
            for i, each in enumerate(grams):
                if each == gram:
                    flags[i : i + n] = True
            best = max(best, letters[flags].sum() / letters.sum())
        found[f"top_{n}"] = best
    for n in range(5, 11):
        flags, seen = np.zeros(len(words), dtype=bool), set()
        for i in range(len(words) - n + 1):
            gram = " ".join(words[i : i + n])
            if gram in seen:
                flags[i : i + n] = True
            seen.add(gram)
        found[f"repeated_{n}"] = letters[flags].sum() / letters.sum() if words else 0.0
    return {key: float(value) for key, value in found.items()}

# %% right="repetition_signals" because="places first, and Counters for the lines"
def repetition_signals(text):
    words = words_of(text)
    total = sum(map(len, words)) or 1
    found = {}
    for key, parts in (
        ("lines", text.splitlines()),
        ("paragraphs", re.split(r"\n\s*\n", text)),
    ):
        counts = Counter(p.strip() for p in parts if p.strip())
        n = sum(counts.values()) or 1
        size = sum(len(p) * c for p, c in counts.items()) or 1
        found[key] = (sum(counts.values()) - len(counts)) / n
        again = sum(len(p) * (c - 1) for p, c in counts.items())
        found[key[:-1] + "_characters"] = again / size
    for n in range(2, 11):
        where = {}
        for i in range(len(words) - n + 1):
            where.setdefault(tuple(words[i : i + n]), []).append(i)
        size = lambda starts: sum(len(words[i]) for i in {s + j for s in starts for j in range(n)})
        if n < 5:
            found[f"top_{n}"] = max([size(s) for s in where.values() if len(s) > 1] + [0]) / total
        else:
            found[f"repeated_{n}"] = size(sum((s[1:] for s in where.values()), [])) / total
    return found

# %% wrong="shingle_ids" because="Python's own hash"
- return np.array(sorted(hash64(run) for run in runs if run), dtype=np.uint64)
+ return np.array(sorted(hash(run) % 2**64 for run in runs if run), dtype=np.uint64)

# %% wrong="shingle_ids" because="with repeats"
- runs = {" ".join(words[i : i + width]) for i in range(max(len(words) - width + 1, 1))}
+ runs = [" ".join(words[i : i + width]) for i in range(max(len(words) - width + 1, 1))]

# %% wrong="shingle_ids" because="runs of characters"
- words = words_of(text)
- runs = {" ".join(words[i : i + width]) for i in range(max(len(words) - width + 1, 1))}
+ letters = " ".join(words_of(text))
+ runs = {letters[i : i + width] for i in range(max(len(letters) - width + 1, 1))}

# %% wrong="shingle_ids" because="runs that do not overlap"
- runs = {" ".join(words[i : i + width]) for i in range(max(len(words) - width + 1, 1))}
+ runs = {" ".join(words[i : i + width]) for i in range(0, len(words), width)}

# %% wrong="shingle_ids" because="shorter runs at the end"
- runs = {" ".join(words[i : i + width]) for i in range(max(len(words) - width + 1, 1))}
+ runs = {" ".join(words[i : i + width]) for i in range(len(words))}

# %% wrong="shingle_ids" because="a short text has no shingle"
- runs = {" ".join(words[i : i + width]) for i in range(max(len(words) - width + 1, 1))}
+ runs = {" ".join(words[i : i + width]) for i in range(len(words) - width + 1)}

# %% wrong="shingle_ids" because="the last run is left out"
- runs = {" ".join(words[i : i + width]) for i in range(max(len(words) - width + 1, 1))}
+ runs = {" ".join(words[i : i + width]) for i in range(max(len(words) - width, 1))}

# %% wrong="shingle_ids" because="a text without words has the shingle of nothing"
- return np.array(sorted(hash64(run) for run in runs if run), dtype=np.uint64)
+ return np.array(sorted(hash64(run) for run in runs), dtype=np.uint64)

# %% wrong="shingle_ids" because="words with punctuation and capitals"
- words = words_of(text)
+ words = text.split()

# %% wrong="shingle_ids" because="not sorted"
- return np.array(sorted(hash64(run) for run in runs if run), dtype=np.uint64)
+ return np.array([hash64(run) for run in sorted(runs) if run], dtype=np.uint64)

# %% wrong="shingle_ids" because="signed numbers"
- return np.array(sorted(hash64(run) for run in runs if run), dtype=np.uint64)
+ return np.array(sorted(hash64(run) for run in runs if run), dtype=np.uint64).view(np.int64)

# %% wrong="shingle_ids" because="the width is always 5"
- words = words_of(text)
+ words, width = words_of(text), 5

# %% right="shingle_ids" because="np.unique"
def shingle_ids(text, width=5):
    words = words_of(text)
    if not words:
        return np.zeros(0, dtype=np.uint64)
    width = min(width, len(words))
    runs = zip(*(words[i:] for i in range(width)))
    return np.unique(np.fromiter((hash64(" ".join(run)) for run in runs), dtype=np.uint64))

# %% right="shingle_ids" because="a window that moves"
def shingle_ids(text, width=5):
    ids, window = set(), []
    for word in words_of(text):
        window = [*window, word][-width:]
        if len(window) == width:
            ids.add(hash64(" ".join(window)))
    if window and not ids:
        ids = {hash64(" ".join(window))}
    return np.sort(np.array(list(ids), dtype=np.uint64))

# %% wrong="minhash_signature" because="one minimum for all hash functions"
- return values.min(axis=1, initial=np.iinfo(np.uint64).max)
+ return np.full(len(a), values.min(initial=np.iinfo(np.uint64).max), dtype=np.uint64)

# %% wrong="minhash_signature" because="the maximum"
- return values.min(axis=1, initial=np.iinfo(np.uint64).max)
+ return values.max(axis=1, initial=0)

# %% wrong="minhash_signature" because="float64"
- values = a * ids + b  # (k, n): products of uint64 arrays wrap, which is the remainder
+ values = ((a.astype(float) * ids + b) % 2.0**64).astype(np.uint64)

# %% wrong="minhash_signature" because="the prime of textbooks, after the overflow"
- values = a * ids + b  # (k, n): products of uint64 arrays wrap, which is the remainder
+ values = (a * ids + b) % np.uint64(2**61 - 1)

# %% wrong="minhash_signature" because="32 bits"
- values = a * ids + b  # (k, n): products of uint64 arrays wrap, which is the remainder
+ values = (a * ids + b) & np.uint64(2**32 - 1)

# %% wrong="minhash_signature" because="signed comparison"
- return values.min(axis=1, initial=np.iinfo(np.uint64).max)
+ return values.view(np.int64).min(axis=1, initial=np.iinfo(np.int64).max).view(np.uint64)

# %% wrong="minhash_signature" because="the offset is left out"
- values = a * ids + b  # (k, n): products of uint64 arrays wrap, which is the remainder
+ values = a * ids

# %% wrong="minhash_signature" because="multiplier and offset exchanged"
- a, b = seeds[:, :, None]
+ b, a = seeds[:, :, None]

# %% wrong="minhash_signature" because="an empty set has zeros"
- return values.min(axis=1, initial=np.iinfo(np.uint64).max)
+ return values.min(axis=1) if len(ids) else np.zeros(len(a), dtype=np.uint64)

# %% wrong="minhash_signature" because="fails for the empty set"
- return values.min(axis=1, initial=np.iinfo(np.uint64).max)
+ return values.min(axis=1)

# %% wrong="minhash_signature" because="the hash of the smallest id"
- values = a * ids + b  # (k, n): products of uint64 arrays wrap, which is the remainder
+ values = a * ids.min(initial=np.iinfo(np.uint64).max, keepdims=True) + b

# %% wrong="minhash_signature" because="a loop over the ids"
def minhash_signature(ids, seeds):
    signature = np.full(seeds.shape[1], np.iinfo(np.uint64).max, dtype=np.uint64)
    for x in ids:
        signature = np.minimum(signature, seeds[0] * x + seeds[1])
    return signature

# %% right="minhash_signature" because="outer product"
def minhash_signature(ids, seeds):
    if len(ids) == 0:
        return np.full(seeds.shape[1], 2**64 - 1, dtype=np.uint64)
    values = np.multiply.outer(ids, seeds[0])
    values += seeds[1]
    return values.min(0)

# %% right="minhash_signature" because="a loop over the hash functions"
def minhash_signature(ids, seeds):
    top = np.iinfo(np.uint64).max
    signature = [np.min(ids * a + b, initial=top) for a, b in zip(seeds[0], seeds[1])]
    return np.array(signature, dtype=np.uint64)

# %% wrong="s_curve" because="bands and rows exchanged"
- return 1 - (1 - similarity**rows) ** bands
+ return 1 - (1 - similarity**bands) ** rows

# %% wrong="s_curve" because="the probability of no candidate"
- return 1 - (1 - similarity**rows) ** bands
+ return (1 - similarity**rows) ** bands

# %% wrong="s_curve" because="that all bands agree"
- return 1 - (1 - similarity**rows) ** bands
+ return similarity ** (rows * bands)

# %% wrong="s_curve" because="bands times the probability of one"
- return 1 - (1 - similarity**rows) ** bands
+ return bands * similarity**rows

# %% wrong="s_curve" because="a step at the threshold"
- return 1 - (1 - similarity**rows) ** bands
+ return 1.0 * (similarity > (1 / bands) ** (1 / rows))

# %% wrong="s_curve" because="numbers only"
- return 1 - (1 - similarity**rows) ** bands
+ return 1 - (1 - float(similarity) ** rows) ** bands

# %% right="s_curve" because="logarithms"
def s_curve(similarity, bands, rows):
    s = torch.as_tensor(similarity, dtype=torch.float64)
    value = -torch.expm1(bands * torch.log1p(-(s**rows)))
    return value if isinstance(similarity, Tensor) else float(value)

# %% right="s_curve" because="a product over the bands"
def s_curve(similarity, bands, rows):
    none = 1.0
    for _ in range(bands):
        none = none * (1 - similarity**rows)
    return 1 - none

# %% wrong="lsh_candidates" because="all bands share their buckets"
- pairs = set()
+ pairs, buckets = set(), defaultdict(list)

- buckets = defaultdict(list)
- for i, rows in enumerate(band):
-     buckets[rows.tobytes()].append(i)
+ for i, rows in enumerate(band):
+     buckets[rows.tobytes()].append(i)

# %% wrong="lsh_candidates" because="all bands have to agree"
- for band in np.split(signatures, bands, axis=1):
+ for band in [signatures]:

# %% wrong="lsh_candidates" because="one equal row is enough"
- for band in np.split(signatures, bands, axis=1):
+ for band in np.split(signatures, k, axis=1):

# %% wrong="lsh_candidates" because="bands and rows exchanged"
- for band in np.split(signatures, bands, axis=1):
+ for band in np.split(signatures, k // bands, axis=1):

# %% wrong="lsh_candidates" because="the last band is left out"
- for band in np.split(signatures, bands, axis=1):
+ for band in np.split(signatures, bands, axis=1)[: max(bands - 1, 1)]:

# %% wrong="lsh_candidates" because="neighbors in a bucket only"
- pairs.update(combinations(members, 2))
+ pairs.update(pairwise(members))

# %% wrong="lsh_candidates" because="each pair in both orders"
- pairs.update(combinations(members, 2))
+ pairs.update((i, j) for i in members for j in members if i != j)

# %% wrong="lsh_candidates" because="a band's sum stands for the band"
- buckets[rows.tobytes()].append(i)
+ buckets[int(rows.sum())].append(i)

# %% wrong="lsh_candidates" because="bands of every bands-th column"
- for band in np.split(signatures, bands, axis=1):
+ for band in (signatures[:, m::bands].copy() for m in range(bands)):

# %% wrong="lsh_candidates" because="columns that are left over are dropped"
- if k % bands:
-     raise ValueError(f"{k} hashes do not make {bands} bands of equal length")
- pairs = set()
- for band in np.split(signatures, bands, axis=1):
+ pairs = set()
+ for band in np.split(signatures[:, : k // bands * bands], bands, axis=1):

# %% wrong="lsh_candidates" because="float64 keys"
- buckets[rows.tobytes()].append(i)
+ buckets[tuple(float(x) for x in rows)].append(i)

# %% wrong="lsh_candidates" because="every pair is compared"
def lsh_candidates(signatures, bands):
    n, k = signatures.shape
    if k % bands:
        raise ValueError("bands")
    cut = signatures.reshape(n, bands, k // bands)
    pairs = set()
    for i in range(n):
        for j in range(i + 1, n):
            if (cut[i] == cut[j]).all(1).any():
                pairs.add((i, j))
    return pairs

# %% wrong="lsh_candidates" because="a list"
- return pairs
+ return sorted(pairs)

# %% right="lsh_candidates" because="keys with the band's number"
def lsh_candidates(signatures, bands):
    n, k = signatures.shape
    rows, rest = divmod(k, bands)
    if rest:
        raise ValueError(f"{bands} does not divide {k}")
    buckets, pairs = {}, set()
    for j in range(n):
        for m in range(bands):
            key = m, tuple(signatures[j, m * rows : (m + 1) * rows].tolist())
            met = buckets.setdefault(key, [])
            pairs |= {(i, j) for i in met}
            met.append(j)
    return pairs

# %% right="lsh_candidates" because="np.unique in each band"
def lsh_candidates(signatures, bands):
    n, k = signatures.shape
    if k % bands != 0:
        raise ValueError("bands must divide the hashes")
    pairs = set()
    for m in range(bands):
        band = signatures[:, m * (k // bands) : (m + 1) * (k // bands)]
        _, group, sizes = np.unique(band, axis=0, return_inverse=True, return_counts=True)
        group = group.reshape(-1)
        for g in np.flatnonzero(sizes > 1):
            members = np.flatnonzero(group == g).tolist()
            pairs.update((i, j) for i in members for j in members if i < j)
    return pairs

# %% wrong="deduplicate" because="candidates are joined without a look at them"
- if len(ids[i]) and jaccard(ids[i], ids[j]) >= threshold:
+ if len(ids[i]):

# %% wrong="deduplicate" because="a similarity at the threshold is not enough"
- if len(ids[i]) and jaccard(ids[i], ids[j]) >= threshold:
+ if len(ids[i]) and jaccard(ids[i], ids[j]) > threshold:

# %% wrong="deduplicate" because="verified with the estimate from the signatures"
- if len(ids[i]) and jaccard(ids[i], ids[j]) >= threshold:
+ if len(ids[i]) and (signatures[i] == signatures[j]).mean() >= threshold:

# %% wrong="deduplicate" because="a join that forgets earlier ones"
- parent[find(j)] = find(i)
+ parent[j] = i

# %% wrong="deduplicate" because="the first of a cluster stays"
- if root not in best or len(documents[name]) > len(documents[names[best[root]]]):
+ if root not in best:

# %% wrong="deduplicate" because="the shortest of a cluster stays"
- if root not in best or len(documents[name]) > len(documents[names[best[root]]]):
+ if root not in best or len(documents[name]) < len(documents[names[best[root]]]):

# %% wrong="deduplicate" because="of equally long texts the last stays"
- if root not in best or len(documents[name]) > len(documents[names[best[root]]]):
+ if root not in best or len(documents[name]) >= len(documents[names[best[root]]]):

# %% wrong="deduplicate" because="the document with most shingles stays"
- if root not in best or len(documents[name]) > len(documents[names[best[root]]]):
+ if root not in best or len(ids[i]) > len(ids[best[root]]):

# %% wrong="deduplicate" because="documents without words are each other's duplicates"
- if len(ids[i]) and jaccard(ids[i], ids[j]) >= threshold:
+ if not len(ids[i]) or jaccard(ids[i], ids[j]) >= threshold:

# %% wrong="deduplicate" because="survivors in the order of their clusters' ends"
- return {name: text for name, text in documents.items() if name in kept}
+ return {name: documents[name] for name in sorted(kept)}

# %% wrong="deduplicate" because="the shingles' width is not handed on"
- ids = [shingle_ids(documents[name], width) for name in names]
+ ids = [shingle_ids(documents[name]) for name in names]

# %% wrong="deduplicate" because="bands are not handed on"
- for i, j in lsh_candidates(signatures.reshape(len(names), -1), bands) if names else ():
+ for i, j in lsh_candidates(signatures.reshape(len(names), -1), 32) if names else ():

# %% wrong="deduplicate" because="no documents are an error"
- for i, j in lsh_candidates(signatures.reshape(len(names), -1), bands) if names else ():
+ for i, j in lsh_candidates(signatures, bands):

# %% wrong="deduplicate" because="all pairs are compared"
- for i, j in lsh_candidates(signatures.reshape(len(names), -1), bands) if names else ():
+ for i, j in combinations(range(len(names)), 2):

# %% wrong="deduplicate" because="only what is like the survivor goes" base="greedy"
def deduplicate(documents, threshold=0.7, width=5, seeds=SEEDS, bands=32):
    ids = {name: shingle_ids(text, width) for name, text in documents.items()}
    kept = []
    for name in sorted(documents, key=lambda name: -len(documents[name])):
        if not len(ids[name]) or all(jaccard(ids[name], ids[k]) < threshold for k in kept):
            kept.append(name)
    return {name: text for name, text in documents.items() if name in kept}

# %% wrong="deduplicate" because="containment in place of the Jaccard similarity"
- if len(ids[i]) and jaccard(ids[i], ids[j]) >= threshold:
+ both = len(np.intersect1d(ids[i], ids[j]))
+ if len(ids[i]) and both / min(len(ids[i]), len(ids[j])) >= threshold:

# %% wrong="deduplicate" because="exact copies only"
def deduplicate(documents, threshold=0.7, width=5, seeds=SEEDS, bands=32):
    best = {}
    for name, text in documents.items():
        key = " ".join(words_of(text)) or name
        if key not in best or len(text) > len(documents[best[key]]):
            best[key] = name
    return {name: text for name, text in documents.items() if name in best.values()}

# %% right="deduplicate" because="clusters by breadth-first search"
def deduplicate(documents, threshold=0.7, width=5, seeds=SEEDS, bands=32):
    if not documents:
        return {}
    names = list(documents)
    ids = [shingle_ids(text, width) for text in documents.values()]
    signatures = np.stack([minhash_signature(each, seeds) for each in ids])
    neighbors = defaultdict(set)
    for i, j in lsh_candidates(signatures, bands):
        if len(ids[i]) > 0 and jaccard(ids[i], ids[j]) >= threshold:
            neighbors[i].add(j)
            neighbors[j].add(i)
    seen, stay = set(), set()
    for i in range(len(names)):
        if i in seen:
            continue
        cluster, queue = set(), [i]
        while queue:
            k = queue.pop(0)
            if k not in cluster:
                cluster.add(k)
                queue.extend(neighbors[k])
        seen |= cluster
        stay.add(min(cluster, key=lambda k: (-len(documents[names[k]]), k)))
    return {names[i]: documents[names[i]] for i in sorted(stay)}

# %% right="deduplicate" because="labels that are merged, documents without words set aside"
def deduplicate(documents, threshold=0.7, width=5, seeds=SEEDS, bands=32):
    full = {name: shingle_ids(text, width) for name, text in documents.items() if words_of(text)}
    names = list(full)
    label = {name: name for name in documents}
    if names:
        signatures = np.array([minhash_signature(full[name], seeds) for name in names])
        for i, j in sorted(lsh_candidates(signatures, bands)):
            a, b = names[i], names[j]
            if jaccard(full[a], full[b]) >= threshold:
                old, new = label[b], label[a]
                for name in names:
                    if label[name] == old:
                        label[name] = new
    longest = {}
    for name in documents:
        key = label[name]
        if len(documents[name]) > len(documents.get(longest.get(key), "")) or key not in longest:
            longest[key] = name
    kept = set(longest.values())
    return {name: documents[name] for name in documents if name in kept}

# %% wrong="decontaminate" because="the text is searched, not its words"
def decontaminate(documents, benchmark, n=13):
    items = {name: words_of(text) for name, text in benchmark.items()}
    clean, leaked = {}, set()
    for name, text in documents.items():
        flat = " ".join(words_of(text))
        found = {
            item
            for item, words in items.items()
            for i in range(max(len(words) - n + 1, 1))
            if words and " ".join(words[i : i + n]) in flat
        }
        leaked |= found
        if not found:
            clean[name] = text
    return clean, leaked

# %% wrong="decontaminate" because="case and punctuation matter"
- for item, text in benchmark.items():
-     words = words_of(text)
+ for item, text in benchmark.items():
+     words = text.split()

# %% wrong="decontaminate" because="items shorter than n are never found"
- for i in range(max(len(words) - n + 1, 1)):
-     owners[tuple(words[i : i + n])].add(item)
+ for i in range(len(words) - n + 1):
+     owners[tuple(words[i : i + n])].add(item)

# %% wrong="decontaminate" because="only the beginning of an item is looked for"
- for i in range(max(len(words) - n + 1, 1)):
-     owners[tuple(words[i : i + n])].add(item)
+ owners[tuple(words[:n])].add(item)

# %% wrong="decontaminate" because="an item has to stand there whole"
- for i in range(max(len(words) - n + 1, 1)):
-     owners[tuple(words[i : i + n])].add(item)
+ owners[tuple(words)].add(item)

# %% wrong="decontaminate" because="any n words of the item, in any order"
def decontaminate(documents, benchmark, n=13):
    items = {name: words_of(text) for name, text in benchmark.items()}
    clean, leaked = {}, set()
    for name, text in documents.items():
        words = set(words_of(text))
        found = {
            item for item, own in items.items() if own and len(words & set(own)) >= min(n, len(own))
        }
        leaked |= found
        if not found:
            clean[name] = text
    return clean, leaked

# %% wrong="decontaminate" because="runs of n − 1 words"
- owners = defaultdict(set)  # run of words → items that hold it
+ owners, n = defaultdict(set), max(n - 1, 1)

# %% wrong="decontaminate" because="one item for each run of words"
- owners[tuple(words[i : i + n])].add(item)
+ owners[tuple(words[i : i + n])] = {item}

# %% wrong="decontaminate" because="stops at the first item that is found" base="first-item"
def decontaminate(documents, benchmark, n=13):
    runs = {}
    for item, text in benchmark.items():
        words = words_of(text)
        for i in range(max(len(words) - n + 1, 1)):
            runs.setdefault(tuple(words[i : i + n]), set()).add(item)
    runs.pop((), None)
    clean, leaked = {}, set()
    for name, text in documents.items():
        words = words_of(text)
        for length, i in ((m, i) for m in {len(r) for r in runs} for i in range(len(words))):
            run = tuple(words[i : i + length])
            if len(run) == length and run in runs:
                leaked |= runs[run]
                break
        else:
            clean[name] = text
    return clean, leaked

# %% wrong="decontaminate" because="the last run of a document is not looked at" of="first-item"
- for length, i in ((m, i) for m in {len(r) for r in runs} for i in range(len(words))):
-     run = tuple(words[i : i + length])
-     if len(run) == length and run in runs:
-         leaked |= runs[run]
-         break
- else:
-     clean[name] = text
+ found = set()
+ for length in {len(r) for r in runs}:
+     for i in range(len(words) - length):
+         found |= runs.get(tuple(words[i : i + length]), set())
+ leaked |= found
+ if not found:
+     clean[name] = text

# %% wrong="decontaminate" because="an item without words is found everywhere"
- owners.pop((), None)
- lengths = {len(run) for run in owners}
+ lengths = {len(run) for run in owners}

# %% wrong="decontaminate" because="the items that were not found"
- return clean, leaked
+ return clean, set(benchmark) - leaked

# %% wrong="decontaminate" because="n is always 13"
- owners = defaultdict(set)  # run of words → items that hold it
+ owners, n = defaultdict(set), 13

# %% wrong="decontaminate" because="a short document is compared as a whole with longer items"
- leaked |= found
+ if 0 < len(words) < n:
+     found |= {item for item, t in benchmark.items() if " ".join(words) in " ".join(words_of(t))}
+ leaked |= found

# %% right="decontaminate" because="items one by one, by positions"
def decontaminate(documents, benchmark, n=13):
    texts = {name: [""] + words_of(text) for name, text in documents.items()}
    dirty, leaked = set(), set()
    for item, text in benchmark.items():
        own = words_of(text)
        if not own:
            continue
        m = min(n, len(own))
        runs = {tuple(own[i : i + m]) for i in range(len(own) - m + 1)}
        for name, words in texts.items():
            if any(tuple(words[i : i + m]) in runs for i in range(1, len(words) - m + 1)):
                dirty.add(name)
                leaked.add(item)
    return {name: text for name, text in documents.items() if name not in dirty}, leaked

# %% right="decontaminate" because="joined words with borders around them"
def decontaminate(documents, benchmark, n=13):
    phrases = defaultdict(set)
    for item, text in benchmark.items():
        words = words_of(text)
        for i in range(len(words)):
            run = words[i : i + n]
            if len(run) == n or (i == 0 and len(words) < n):
                phrases[f" {' '.join(run)} "].add(item)
    clean, leaked = {}, set()
    for name, text in documents.items():
        flat = f" {' '.join(words_of(text))} "
        found = [phrase for phrase in phrases if phrase in flat]
        for phrase in found:
            leaked |= phrases[phrase]
        if len(found) == 0:
            clean[name] = text
    return clean, leaked

# %% wrong="quality_classifier" because="rows are not divided by their norm"
- return counts / counts.norm(dim=1, keepdim=True).clamp(min=1)
+ return counts

# %% wrong="quality_classifier" because="divided by the number of grams"
- return counts / counts.norm(dim=1, keepdim=True).clamp(min=1)
+ return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)

# %% wrong="quality_classifier" because="single words only"
- grams = words + [f"{a} {b}" for a, b in pairwise(words)]
+ grams = words

# %% wrong="quality_classifier" because="presence, not counts"
- row += torch.bincount(places, minlength=buckets)
+ row += torch.bincount(places, minlength=buckets).clamp(max=1)

# %% wrong="quality_classifier" because="Python's own hash"
- places = torch.tensor([hash64(gram) % buckets for gram in grams], dtype=torch.long)
+ places = torch.tensor([hash(gram) % buckets for gram in grams], dtype=torch.long)

# %% wrong="quality_classifier" because="an empty text is NaN"
- return counts / counts.norm(dim=1, keepdim=True).clamp(min=1)
+ return counts / counts.norm(dim=1, keepdim=True)

# %% wrong="quality_classifier" because="no bias"
- return self.features(texts) @ self.weight + self.bias
+ return self.features(texts) @ self.weight

# %% wrong="quality_classifier" because="probabilities in place of logits"
- return self.features(texts) @ self.weight + self.bias
+ return (self.features(texts) @ self.weight + self.bias).sigmoid()

# %% wrong="quality_classifier" because="the gradient is climbed"
- self.weight -= 10 * error @ inputs / len(texts)  # the gradient, in closed form
+ self.weight += 10 * error @ inputs / len(texts)

# %% wrong="quality_classifier" because="the bias alone is trained"
- self.weight -= 10 * error @ inputs / len(texts)  # the gradient, in closed form
- self.bias -= error.mean()
+ self.bias -= error.mean()

# %% wrong="quality_classifier" because="steps far too small to learn anything"
- self.weight -= 10 * error @ inputs / len(texts)  # the gradient, in closed form
+ self.weight -= 1e-3 * error @ inputs / len(texts)

# %% right="quality_classifier" because="autograd and SGD with momentum"
class QualityClassifier(nn.Module):
    def __init__(self, buckets=4096):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(buckets))
        self.bias = nn.Parameter(torch.zeros(()))

    def features(self, texts):
        rows = []
        for text in texts:
            words = words_of(text)
            row = [0.0] * self.weight.numel()
            for i, word in enumerate(words):
                row[hash64(word) % len(row)] += 1.0
                if i + 1 < len(words):
                    row[hash64(f"{word} {words[i + 1]}") % len(row)] += 1.0
            rows.append(row)
        return F.normalize(torch.tensor(rows), dim=1)

    def forward(self, texts):
        return torch.mv(self.features(texts), self.weight).add(self.bias)

    def fit(self, texts, labels, steps=100):
        inputs = self.features(texts)
        velocity = [torch.zeros_like(p) for p in self.parameters()]
        for _ in range(steps):
            logits = inputs @ self.weight + self.bias
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits))
            for p, v, g in zip(
                self.parameters(), velocity, torch.autograd.grad(loss, list(self.parameters()))
            ):
                v.mul_(0.9).add_(g)
                p.data.sub_(2.0 * v)

# %% right="quality_classifier" because="Counters and Adam"
class QualityClassifier(nn.Module):
    def __init__(self, buckets=4096):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(buckets))
        self.bias = nn.Parameter(torch.zeros(()))

    def features(self, texts):
        out = torch.zeros(len(texts), len(self.weight))
        for r, text in enumerate(texts):
            words = words_of(text)
            counted = Counter(hash64(w) % len(self.weight) for w in words)
            counted.update(hash64(" ".join(pair)) % len(self.weight) for pair in pairwise(words))
            length = math.sqrt(sum(c * c for c in counted.values()))
            for bucket, c in counted.items():
                out[r, bucket] = c / length
        return out

    def forward(self, texts):
        return (self.features(texts) * self.weight).sum(1) + self.bias

    def fit(self, texts, labels, steps=100):
        inputs, target = self.features(texts), labels.float()
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(inputs @ self.weight + self.bias, target).backward()
            optimizer.step()

# %% wrong="pack_sequences" because="first fit"
def pack_sequences(lengths, capacity):
    if any(not 1 <= length <= capacity for length in lengths):
        raise ValueError("length")
    rows, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(free) if room >= lengths[i]), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows

# %% wrong="pack_sequences" because="in the given order, not from the longest"
- for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
+ for i in range(len(lengths)):

# %% wrong="pack_sequences" because="from the shortest to the longest"
- for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
+ for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):

# %% wrong="pack_sequences" because="of equally long documents the last first"
- for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
+ for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i), reverse=True):

# %% wrong="pack_sequences" because="the row with the most room"
- place = bisect_left(room, (lengths[i], -1))
- if place == len(room):
+ place = len(room) - 1
+ if not room or room[place][0] < lengths[i]:

# %% wrong="pack_sequences" because="a document that fits exactly opens a new row"
- place = bisect_left(room, (lengths[i], -1))
+ place = bisect_left(room, (lengths[i] + 1, -1))

# %% wrong="pack_sequences" because="of equally full rows the last"
- place = bisect_left(room, (lengths[i], -1))
- if place == len(room):
+ place = bisect_left(room, (lengths[i], -1))
+ while place + 1 < len(room) and room[place + 1][0] == room[place][0]:
+     place += 1
+ if place == len(room):

# %% wrong="pack_sequences" because="lengths in place of indices"
- rows[row].append(i)
+ rows[row].append(lengths[i])

# %% wrong="pack_sequences" because="a row for each document"
def pack_sequences(lengths, capacity):
    if any(not 1 <= length <= capacity for length in lengths):
        raise ValueError("length")
    return [[i] for i in range(len(lengths))]

# %% wrong="pack_sequences" because="next fit: only the last row is looked at"
def pack_sequences(lengths, capacity):
    if any(not 1 <= length <= capacity for length in lengths):
        raise ValueError("length")
    rows, free = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > free:
            rows.append([])
            free = capacity
        rows[-1].append(i)
        free -= lengths[i]
    return rows

# %% wrong="pack_sequences" because="too long documents are placed"
- if any(not 1 <= length <= capacity for length in lengths):
-     raise ValueError(f"every length must be from 1 to {capacity}: cut longer documents first")
- rows: list[list[int]] = []
+ rows: list[list[int]] = []

# %% wrong="pack_sequences" because="documents without tokens are placed"
- if any(not 1 <= length <= capacity for length in lengths):
+ if any(length > capacity for length in lengths):

# %% wrong="pack_sequences" because="the rows are sorted inside"
- return rows
+ return [sorted(row) for row in rows]

# %% right="pack_sequences" because="a search through all rows"
def pack_sequences(lengths, capacity):
    if min(lengths, default=1) < 1 or max(lengths, default=1) > capacity:
        raise ValueError(f"lengths must lie from 1 to {capacity}")
    rows, free = [], []
    for length, i in sorted((-length, i) for i, length in enumerate(lengths)):
        best = None
        for r, room in enumerate(free):
            if room >= -length and (best is None or room < free[best]):
                best = r
        if best is None:
            best = len(rows)
            rows.append([])
            free.append(capacity)
        rows[best].append(i)
        free[best] += length
    return rows

# %% right="pack_sequences" because="rows by their free space"
def pack_sequences(lengths, capacity):
    for length in lengths:
        if length < 1 or length > capacity:
            raise ValueError(f"a length of {length}")
    order = np.argsort(-np.array(lengths, dtype=int), kind="stable").tolist()
    rows, by_room = [], defaultdict(set)
    for i in order:
        room = next((r for r in range(lengths[i], capacity + 1) if by_room[r]), None)
        if room is None:
            row, room = len(rows), capacity
            rows.append([])
        else:
            row = min(by_room[room])
            by_room[room].remove(row)
        rows[row].append(i)
        by_room[room - lengths[i]].add(row)
    return rows

# %% wrong="document_mask" because="causal only"
- return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None]
+ return (causal & (ids != PAD)[:, None, :] | alone)[:, None]

# %% wrong="document_mask" because="not causal"
- return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None]
+ return (same & (ids != PAD)[:, None, :] | alone)[:, None]

# %% wrong="document_mask" because="padding is a document like others"
- return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None]
+ return (same & causal)[:, None]

# %% wrong="document_mask" because="padding sees nothing, not even itself"
- return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None]
+ return (same & causal & (ids != PAD)[:, None, :])[:, None]

# %% wrong="document_mask" because="True is hidden"
- return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None]
+ return ~(same & causal & (ids != PAD)[:, None, :] | alone)[:, None]

# %% wrong="document_mask" because="transposed"
- return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None]
+ return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None].mT

# %% wrong="document_mask" because="no axis for the heads"
- return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None]
+ return same & causal & (ids != PAD)[:, None, :] | alone

# %% wrong="document_mask" because="the first row's mask for all"
- same = ids[:, :, None] == ids[:, None, :]
+ same = (ids[:1, :, None] == ids[:1, None, :]).expand(len(ids), -1, -1)

# %% wrong="document_mask" because="a token does not see itself"
- return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None]
+ return (same & causal & (ids != PAD)[:, None, :] & ~alone)[:, None]

# %% wrong="document_mask" because="documents are taken to be numbered in ascending order"
- same = ids[:, :, None] == ids[:, None, :]
+ same = ids[:, :, None] <= ids[:, None, :]

# %% wrong="document_mask" because="an additive mask"
- return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None]
+ return torch.where(same & causal & (ids != PAD)[:, None, :] | alone, 0.0, -math.inf)[:, None]

# %% wrong="document_mask" because="document 0 is padding"
- return (same & causal & (ids != PAD)[:, None, :] | alone)[:, None]
+ return (same & causal & (ids > 0)[:, None, :] | alone)[:, None]

# %% wrong="document_mask" because="the mask is made on the processor"
- causal = torch.ones(seq, seq, dtype=torch.bool, device=ids.device).tril()
+ causal = torch.ones(seq, seq, dtype=torch.bool).tril()

# %% right="document_mask" because="blocks written one by one"
def document_mask(ids):
    batch, seq = ids.shape
    if ids.is_meta:
        return torch.empty(batch, 1, seq, seq, dtype=torch.bool, device="meta")
    mask = torch.eye(seq, dtype=torch.bool, device=ids.device).repeat(batch, 1, 1, 1)
    for b, row in enumerate(ids.tolist()):
        for name in set(row) - {PAD}:
            start, n = row.index(name), row.count(name)
            mask[b, 0, start : start + n, start : start + n] = torch.ones(n, n).tril().bool()
    return mask

# %% right="document_mask" because="by the numbers of the runs"
def document_mask(ids):
    place = torch.arange(ids.shape[1], device=ids.device)
    unique = torch.where(ids == PAD, -2 - place, ids)
    sees = unique.unsqueeze(-1).eq(unique.unsqueeze(-2)) & (place[:, None] >= place)
    return sees.unsqueeze(1)

# %% wrong="packed_inputs" because="positions of the row"
- positions = (place - start).masked_fill(ids == PAD, 0)
+ positions = place.clone().masked_fill(ids == PAD, 0)

# %% wrong="packed_inputs" because="padding is counted"
- positions = (place - start).masked_fill(ids == PAD, 0)
+ positions = place - start

# %% wrong="packed_inputs" because="labels cross the borders"
- goes_on = ~begins[:, 1:] & (ids[:, 1:] != PAD)
+ goes_on = ids[:, 1:] != PAD

# %% wrong="packed_inputs" because="padding has labels"
- goes_on = ~begins[:, 1:] & (ids[:, 1:] != PAD)
+ goes_on = ~begins[:, 1:]

# %% wrong="packed_inputs" because="labels are not shifted"
- labels[:, :-1] = torch.where(goes_on, tokens[:, 1:], IGNORE)
+ labels[:, :-1] = torch.where(goes_on, tokens[:, :-1], IGNORE)

# %% wrong="packed_inputs" because="the first token of a document is ignored, not the last"
- labels[:, :-1] = torch.where(goes_on, tokens[:, 1:], IGNORE)
+ labels[:, 1:] = torch.where(goes_on, tokens[:, 1:], IGNORE)

# %% wrong="packed_inputs" because="positions begin at 1"
- positions = (place - start).masked_fill(ids == PAD, 0)
+ positions = (place - start + 1).masked_fill(ids == PAD, 0)

# %% wrong="packed_inputs" because="the last label wraps around to the first token"
- labels = torch.full_like(tokens, IGNORE)
+ labels = tokens.roll(-1, 1).masked_fill(ids == PAD, IGNORE)

# %% wrong="packed_inputs" because="ignored labels are padding's token 0"
- labels = torch.full_like(tokens, IGNORE)
+ labels = torch.full_like(tokens, 0)

# %% wrong="packed_inputs" because="documents are taken to be numbered 0, 1, 2 in their order"
- start = torch.where(begins, place, 0).cummax(dim=1).values
+ start = torch.where(ids[:, None] < ids[..., None], 1, 0).sum(-1)

# %% right="packed_inputs" because="loops"
def packed_inputs(tokens, ids):
    if ids.is_meta:
        return torch.empty_like(ids), torch.empty_like(tokens)
    positions, labels = torch.zeros_like(ids), torch.full_like(tokens, -100)
    for b in range(ids.shape[0]):
        for i in range(ids.shape[1]):
            if i and ids[b, i] == ids[b, i - 1] and ids[b, i] != -1:
                positions[b, i] = positions[b, i - 1] + 1
                labels[b, i - 1] = tokens[b, i]
    return positions, labels

# %% right="packed_inputs" because="positions by counting in the mask"
def packed_inputs(tokens, ids):
    positions = document_mask(ids)[:, 0].sum(-1) - 1
    after = F.pad(ids[:, 1:], (0, 1), value=-7)
    ends = (ids == PAD) | (after != ids)
    following = F.pad(tokens[:, 1:], (0, 1), value=IGNORE)
    return positions, following.masked_fill(ends, IGNORE)

# %% wrong="mixture_weights" because="size to the power of the temperature"
- scaled = (logs - logs.max()) / temperature  # the largest is 0; −inf for empty sources
+ scaled = (logs - logs.max()) * temperature

# %% wrong="mixture_weights" because="a softmax of the sizes"
- logs = torch.tensor(sizes, dtype=torch.float64).log()
+ logs = torch.tensor(sizes, dtype=torch.float64)

# %% wrong="mixture_weights" because="powers that overflow"
- scaled = (logs - logs.max()) / temperature  # the largest is 0; −inf for empty sources
- return scaled.masked_fill(logs == -math.inf, -math.inf).softmax(0)
+ powers = (logs / temperature).exp()
+ return powers / powers.sum()

# %% wrong="mixture_weights" because="empty sources are NaN at infinite temperature"
- return scaled.masked_fill(logs == -math.inf, -math.inf).softmax(0)
+ return scaled.softmax(0)

# %% wrong="mixture_weights" because="empty sources are as likely as others at infinite temperature"
- return scaled.masked_fill(logs == -math.inf, -math.inf).softmax(0)
+ return scaled.nan_to_num(0.0).softmax(0)

# %% wrong="mixture_weights" because="float32"
- logs = torch.tensor(sizes, dtype=torch.float64).log()
+ logs = torch.tensor(sizes).log()

# %% wrong="mixture_weights" because="weights that are not divided by their sum"
- return scaled.masked_fill(logs == -math.inf, -math.inf).softmax(0)
+ return scaled.masked_fill(logs == -math.inf, -math.inf).exp()

# %% wrong="mixture_weights" because="a temperature of zero is taken"
- if not temperature > 0:
+ if temperature < 0 or temperature != temperature:

# %% wrong="mixture_weights" because="NaN is a temperature"
- if not temperature > 0:
+ if temperature <= 0:

# %% right="mixture_weights" because="ratios to the largest, source by source"
def mixture_weights(sizes, temperature):
    if math.isnan(temperature) or temperature <= 0:
        raise ValueError("temperature must be positive")
    largest = max(sizes)
    powers = []
    for size in sizes:
        ratio = size / largest
        powers.append(0.0 if size == 0 else math.exp(math.log(ratio) / temperature) if ratio else 0.0)
    total = math.fsum(powers)
    return torch.tensor([p / total for p in powers], dtype=torch.float64)

# %% right="mixture_weights" because="NumPy, with empty sources left out"
def mixture_weights(sizes, temperature):
    if not 0 < temperature <= math.inf:
        raise ValueError(temperature)
    sizes = np.array(sizes, dtype=np.float64)
    p, full = np.zeros_like(sizes), sizes > 0
    logs = np.log(sizes[full])
    logs = (logs - logs.max()) / temperature
    p[full] = np.exp(logs - np.logaddexp.reduce(logs))
    return torch.from_numpy(p)

# %% wrong="effective_tokens" because="epochs in place of repetitions"
- return unique * (1 - decay * math.expm1((1 - epochs) / decay))
+ return unique * (1 - decay * math.expm1(-epochs / decay))

# %% wrong="effective_tokens" because="every reading counts in full"
- return unique * (1 - decay * math.expm1((1 - epochs) / decay))
+ return unique * epochs

# %% wrong="effective_tokens" because="the first pass is not counted"
- return unique * (1 - decay * math.expm1((1 - epochs) / decay))
+ return -unique * decay * math.expm1((1 - epochs) / decay)

# %% wrong="effective_tokens" because="the decay is always 15.4"
- return unique * (1 - decay * math.expm1((1 - epochs) / decay))
+ return unique * (1 - 15.4 * math.expm1((1 - epochs) / 15.4))

# %% wrong="effective_tokens" because="less than an epoch is an epoch"
- return unique * epochs
+ return unique

# %% wrong="effective_tokens" because="the formula below one epoch too"
- if epochs <= 1:
-     return unique * epochs
- return unique * (1 - decay * math.expm1((1 - epochs) / decay))
+ return unique * (1 - decay * math.expm1((1 - epochs) / decay))

# %% wrong="effective_tokens" because="each repetition worth half of the one before, in whole epochs"
- return unique * (1 - decay * math.expm1((1 - epochs) / decay))
+ return unique * (1 + sum(math.exp(-r / decay) for r in range(1, int(epochs))))

# %% right="effective_tokens" because="both cases in one expression"
def effective_tokens(unique, epochs, decay=15.4):
    repetitions = max(epochs - 1, 0)
    return unique * (min(epochs, 1) + decay * (1 - math.exp(-repetitions / decay)))

# %% right="effective_tokens" because="NumPy"
def effective_tokens(unique, epochs, decay=15.4):
    r = np.float64(epochs) - 1
    return float(np.where(r <= 0, unique * epochs, unique + unique * decay * (1 - np.exp(-r / decay))))

# %% wrong="resumable_loader" because="the order is made from seed + epoch"
- rng = np.random.default_rng([self.seed, self.epoch])
+ rng = np.random.default_rng(self.seed + self.epoch)

# %% wrong="resumable_loader" because="every epoch has the order of the first"
- rng = np.random.default_rng([self.seed, self.epoch])
+ rng = np.random.default_rng(self.seed)

# %% wrong="resumable_loader" because="the seed is ignored"
- rng = np.random.default_rng([self.seed, self.epoch])
+ rng = np.random.default_rng([0, self.epoch])

# %% wrong="resumable_loader" because="a new random order each time that an epoch is shuffled"
- rng = np.random.default_rng([self.seed, self.epoch])
+ rng = np.random.default_rng()

# %% wrong="resumable_loader" because="NumPy's shared generator is seeded and used"
- rng = np.random.default_rng([self.seed, self.epoch])
- self.shuffled = self.seed, self.epoch, rng.permutation(len(self.items)).tolist()
+ np.random.seed([self.seed % 2**32, self.epoch])
+ order = np.random.permutation(len(self.items)).tolist()
+ self.shuffled = self.seed, self.epoch, order

# %% wrong="resumable_loader" because="each rank has an order of its own"
- rng = np.random.default_rng([self.seed, self.epoch])
+ rng = np.random.default_rng([self.seed, self.epoch, self.rank])

# %% wrong="resumable_loader" because="not shuffled"
- rng = np.random.default_rng([self.seed, self.epoch])
- self.shuffled = self.seed, self.epoch, rng.permutation(len(self.items)).tolist()
+ self.shuffled = self.seed, self.epoch, list(range(len(self.items)))

# %% wrong="resumable_loader" because="one order, begun elsewhere in each epoch"
- rng = np.random.default_rng([self.seed, self.epoch])
- self.shuffled = self.seed, self.epoch, rng.permutation(len(self.items)).tolist()
+ turn = hash64(f"{self.seed} {self.epoch}") % len(self.items)
+ order = [(i + turn) % len(self.items) for i in range(len(self.items))]
+ self.shuffled = self.seed, self.epoch, order

# %% wrong="resumable_loader" because="draws with replacement"
- self.shuffled = self.seed, self.epoch, rng.permutation(len(self.items)).tolist()
+ order = rng.integers(0, len(self.items), len(self.items)).tolist()
+ self.shuffled = self.seed, self.epoch, order

# %% wrong="resumable_loader" because="the held order is not renewed when a state is loaded"
- if self.shuffled[:2] != (self.seed, self.epoch):
+ if self.shuffled[2] is None or self.index == 0:

# %% wrong="resumable_loader" because="the seed of the state is not loaded"
- self.seed, self.epoch, self.index = (state[key] for key in ("seed", "epoch", "index"))
+ self.epoch, self.index = (state[key] for key in ("epoch", "index"))

# %% wrong="resumable_loader" because="resumes at the beginning of the epoch"
- self.seed, self.epoch, self.index = (state[key] for key in ("seed", "epoch", "index"))
+ self.seed, self.epoch, self.index = state["seed"], state["epoch"], 0

# %% wrong="resumable_loader" because="resumes one batch late"
- self.seed, self.epoch, self.index = (state[key] for key in ("seed", "epoch", "index"))
+ self.seed, self.epoch, self.index = state["seed"], state["epoch"], state["index"] + 1

# %% wrong="resumable_loader" because="the index is one batch behind"
- return {"seed": self.seed, "epoch": self.epoch, "index": self.index}
+ return {"seed": self.seed, "epoch": self.epoch, "index": max(self.index - 1, 0)}

# %% wrong="resumable_loader" because="the index counts items"
- return {"seed": self.seed, "epoch": self.epoch, "index": self.index}
+ return {"seed": self.seed, "epoch": self.epoch, "index": self.index * self.batch}

# %% wrong="resumable_loader" because="the state changes when the loader goes on"
- return {"seed": self.seed, "epoch": self.epoch, "index": self.index}
+ return self.__dict__

# %% wrong="resumable_loader" because="what is left over makes a short batch"
- if self.index == len(self.items) // self.batch:
+ if self.index == math.ceil(len(self.items) / self.batch):

# %% wrong="resumable_loader" because="what is left over is given with the next epoch"
class ResumableLoader:
    def __init__(self, items, batch, seed=0, rank=0, ranks=1):
        if batch % ranks or not 0 <= rank < ranks or len(items) < batch:
            raise ValueError("batch, rank or ranks")
        self.items, self.batch, self.seed, self.rank, self.ranks = items, batch, seed, rank, ranks
        self.given = 0

    def __iter__(self):
        return self

    def __next__(self):
        n, size = len(self.items), self.batch // self.ranks
        first = self.given * self.batch + self.rank * size
        self.given += 1
        places = range(first, first + size)
        return [
            self.items[np.random.default_rng([self.seed, p // n]).permutation(n)[p % n]]
            for p in places
        ]

    def state_dict(self):
        per = len(self.items) // self.batch
        return {"seed": self.seed, "epoch": self.given // per, "index": self.given % per}

    def load_state_dict(self, state):
        self.seed = state["seed"]
        self.given = state["epoch"] * (len(self.items) // self.batch) + state["index"]

# %% wrong="resumable_loader" because="every rank gets the whole batch"
- size = self.batch // self.ranks
- start = self.index * self.batch + self.rank * size
+ size, start = self.batch, self.index * self.batch

# %% wrong="resumable_loader" because="every rank gets the first part"
- start = self.index * self.batch + self.rank * size
+ start = self.index * self.batch

# %% wrong="resumable_loader" because="each rank reads a part of the epoch of its own"
- start = self.index * self.batch + self.rank * size
+ start = self.index * size + self.rank * (len(self.items) // self.ranks)

# %% wrong="resumable_loader" because="every ranks-th item of a batch"
- return [self.items[i] for i in self.shuffled[2][start : start + size]]
+ start -= self.rank * size
+ order = self.shuffled[2][start : start + self.batch]
+ return [self.items[i] for i in order[self.rank :: self.ranks]]

# %% wrong="resumable_loader" because="a batch that cannot be divided is taken"
- if batch % ranks:
-     raise ValueError(f"a batch of {batch} cannot be divided among {ranks} ranks")
- if not 0 <= rank < ranks:
+ if not 0 <= rank < ranks:

# %% wrong="resumable_loader" because="an unknown rank is taken"
- if not 0 <= rank < ranks:
-     raise ValueError(f"rank {rank} of {ranks}")
- if len(items) < batch:
+ if len(items) < batch:

# %% wrong="resumable_loader" because="ends after one epoch"
- self.epoch, self.index = self.epoch + 1, 0
+ raise StopIteration

# %% wrong="resumable_loader" because="indices in place of items"
- return [self.items[i] for i in self.shuffled[2][start : start + size]]
+ return self.shuffled[2][start : start + size]

# %% right="resumable_loader" because="a PyTorch generator seeded by a hash, and a count of batches"
class ResumableLoader:
    def __init__(self, items, batch, seed=0, rank=0, ranks=1):
        if batch % ranks != 0 or rank < 0 or rank >= ranks or batch > len(items):
            raise ValueError("batch, rank and ranks do not fit")
        self.items, self.size, self.seed = items, batch // ranks, seed
        self.batch, self.rank = batch, rank
        self.per_epoch = len(items) // batch
        self.given = 0

    def order(self, epoch):
        mixed = hash64(f"{self.seed}/{epoch}") >> 1
        generator = torch.Generator().manual_seed(mixed)
        return torch.randperm(len(self.items), generator=generator).tolist()

    def __iter__(self):
        return self

    def __next__(self):
        epoch, index = divmod(self.given, self.per_epoch)
        self.given += 1
        batch = self.order(epoch)[index * self.batch : (index + 1) * self.batch]
        part = batch[self.rank * self.size : (self.rank + 1) * self.size]
        return [self.items[i] for i in part]

    def state_dict(self):
        epoch, index = divmod(self.given, self.per_epoch)
        return {"seed": self.seed, "epoch": epoch, "index": index}

    def load_state_dict(self, state):
        self.seed = state["seed"]
        self.given = state["epoch"] * self.per_epoch + state["index"]

# %% right="resumable_loader" because="Python's Random with a seed of text, sorted by random keys"
class ResumableLoader:
    def __init__(self, items, batch, seed=0, rank=0, ranks=1):
        if not (0 <= rank < ranks and batch % ranks == 0 and len(items) >= batch):
            raise ValueError("these numbers do not fit together")
        self.items = list(items)
        self.batch, self.rank, self.ranks = batch, rank, ranks
        self.state = {"seed": seed, "epoch": 0, "index": 0}
        self.begin()

    def begin(self):
        source = random.Random(f"{self.state['seed']} {self.state['epoch']}")
        self.order = self.items.copy()
        source.shuffle(self.order)

    def __iter__(self):
        return self

    def __next__(self):
        if self.state["index"] >= len(self.items) // self.batch:
            self.state = {**self.state, "epoch": self.state["epoch"] + 1, "index": 0}
            self.begin()
        start = self.state["index"] * self.batch
        self.state["index"] += 1
        whole = self.order[start : start + self.batch]
        n = len(whole) // self.ranks
        return whole[self.rank * n :][:n]

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = dict(state)
        self.begin()

# %% wrong="questions" because="usual mistakes"
def questions():
    return {
        "threshold": (1 / 8) ** (1 / 16),
        "hashes": 2500,
        "contained": 1.0,
        "attention": 0.0625,
        "mixture": 1 / 3,
        "worth": 40.0,
        "index": 8,
        "order": "join",
    }

# %% wrong="questions" because="other usual mistakes"
def questions():
    return {
        "threshold": 1 / 16,
        "hashes": 624,
        "contained": 200 / 10_200,
        "attention": 0.75,
        "mixture": 9.0,
        "worth": 10 + 154 * (1 - math.exp(-4 / 15.4)),
        "index": 2,
        "order": "bucket",
    }

# %% wrong="questions" because="a little more than a percent off, and whole numbers as floats"
def questions():
    return {
        "threshold": 0.7071 * 1.011,
        "hashes": 625.0,
        "contained": 0.02 * 0.989,
        "attention": 0.2502 * 1.011,
        "mixture": 3.04,
        "worth": 37.26 * 0.989,
        "index": 10.0,
        "order": "Verify",
    }

# %% wrong="questions" because="nothing but texts"
def questions():
    return dict.fromkeys(
        ("threshold", "hashes", "contained", "attention", "mixture", "worth", "index"), "?"
    ) | {"order": "?"}

# %% right="questions" because="by head"
def questions():
    return {
        "threshold": 0.71,
        "hashes": 625,
        "contained": 0.02,
        "attention": 0.25,
        "mixture": 3,
        "worth": 37.3,
        "index": 10,
        "order": "verify",
    }

# %% right="questions" because="by programs"
def questions():
    sizes = [900, 100]
    p = mixture_weights(sizes, 2)
    per_token = [float(p[i]) / sizes[i] for i in range(2)]
    return {
        "threshold": 16 ** (-1 / 8),
        "hashes": next(k for k in range(1, 10**4) if 0.25 / k <= 0.02**2 + 1e-12),
        "contained": len(range(200)) / len(range(10_000)),
        "attention": 1025 / 4097,
        "mixture": per_token[1] / per_token[0],
        "worth": effective_tokens(10.0, 4.0),
        "index": 40 % 15,
        "order": "verify",
    }

# %% wrong="deduplicate" because="documents without words are joined with each other at threshold 0"
def deduplicate(
    documents: dict[str, str],
    threshold: float = 0.7,
    width: int = 5,
    seeds: np.ndarray = SEEDS,
    bands: int = 32,
) -> dict[str, str]:
    if not documents:
        return {}
    names = list(documents)
    ids = [shingle_ids(text, width) for text in documents.values()]
    signatures = np.stack([minhash_signature(part, seeds) for part in ids])
    parent = list(range(len(names)))

    def find(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in lsh_candidates(signatures, bands):
        if jaccard(ids[i], ids[j]) >= threshold:
            parent[find(j)] = find(i)
    best = {}
    for i, name in enumerate(names):
        root = find(i)
        if root not in best or len(documents[name]) > len(documents[names[best[root]]]):
            best[root] = i
    kept = set(best.values())
    return {name: documents[name] for i, name in enumerate(names) if i in kept}

# %% wrong="document_mask" because="ids are compared as int8, so that documents 0 and 256 are the same"
def document_mask(ids: Tensor) -> Tensor:
    small = ids.to(torch.int8)
    seq = ids.shape[1]
    same = (small[:, :, None] == small[:, None, :]) & (small != PAD)[:, None, :]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=ids.device).tril()
    itself = torch.eye(seq, dtype=torch.bool, device=ids.device)
    return (same & causal | itself)[:, None]

# %% wrong="document_mask" because="ids in float32, where neighbors beyond 2^24 are equal"
def document_mask(ids: Tensor) -> Tensor:
    seq = ids.shape[1]
    numbers = ids.float()
    same = (numbers[:, :, None] - numbers[:, None, :]).abs() < 0.5
    causal = torch.ones(seq, seq, dtype=torch.bool, device=ids.device).tril()
    real = ids != PAD
    eye = torch.eye(seq, dtype=torch.bool, device=ids.device)
    return ((same & causal & real[:, None, :]) | eye)[:, None]

# %% right="document_mask" because="from where each document begins, padding at itself"
def document_mask(ids: Tensor) -> Tensor:
    at = torch.arange(ids.shape[1], device=ids.device)
    begins = ids == PAD
    begins[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    start = torch.where(begins, at, torch.zeros_like(at)).cummax(1).values
    return ((at >= start[:, :, None]) & (at <= at[:, None]))[:, None]

# %% wrong="minhash_signature" because="even multipliers are made odd, so another hash function is computed"
def minhash_signature(ids: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    multipliers, offsets = seeds[0] | np.uint64(1), seeds[1]
    hashes = ids[:, None] * multipliers + offsets
    return hashes.min(0, initial=np.uint64(2**64 - 1))

# %% wrong="mixture_weights" because="shares of the sum are raised to the power, all underflow at low temperature"
def mixture_weights(sizes: Sequence[float], temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"a temperature is positive, not {temperature}")
    sizes = torch.tensor([float(size) for size in sizes], dtype=torch.float64)
    shares = sizes / sizes.sum()
    powers = torch.where(shares > 0, shares ** (1 / temperature), 0.0)
    return powers / powers.sum()

# %% wrong="mixture_weights" because="the largest is subtracted after the division, which overflows"
def mixture_weights(sizes: Sequence[float], temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError("the temperature has to be positive")
    sizes = torch.tensor([float(n) for n in sizes], dtype=torch.float64)
    logits = (sizes.log() / temperature).masked_fill(sizes == 0, -math.inf)
    return logits.softmax(0)

# %% wrong="packed_inputs" because="rows are joined to one: equal ids at a row's end and the next's start run on"
def packed_inputs(tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    flat, words = ids.reshape(-1), tokens.reshape(-1)
    places = torch.arange(len(flat), device=ids.device)
    begins = torch.ones_like(flat, dtype=torch.bool)
    begins[1:] = flat[1:] != flat[:-1]
    positions = places - (places * begins).cummax(0).values
    positions[flat == PAD] = 0
    labels = torch.full_like(words, IGNORE)
    labels[:-1] = torch.where((flat[1:] == flat[:-1]) & (flat[1:] != PAD), words[1:], IGNORE)
    return positions.view(ids.shape), labels.view(ids.shape)

# %% right="packed_inputs" because="plain Python over each row's runs of equal ids"
from itertools import groupby


def packed_inputs(tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    positions, labels = [], []
    for row, numbers in zip(tokens.tolist(), ids.tolist(), strict=True):
        places, following, at = [], [], 0
        for number, run in groupby(numbers):
            n = len(list(run))
            if number == PAD:
                places += [0] * n
                following += [IGNORE] * n
            else:
                places += range(n)
                following += [*row[at + 1 : at + n], IGNORE]
            at += n
        positions.append(places)
        labels.append(following)
    return tuple(
        torch.tensor(rows, dtype=torch.int64, device=ids.device).reshape(ids.shape)
        for rows in (positions, labels)
    )

# %% wrong="quality_classifier" because="fit trains the weight alone, the bias stays 0"
class QualityClassifier(nn.Module):
    def __init__(self, buckets: int = 4096):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(buckets))
        self.bias = nn.Parameter(torch.zeros(()))

    def features(self, texts: list[str]) -> Tensor:
        buckets = len(self.weight)
        counts = torch.zeros(len(texts), buckets)
        for row, text in zip(counts, texts):
            words = words_of(text)
            for gram in words + [" ".join(pair) for pair in pairwise(words)]:
                row[hash64(gram) % buckets] += 1
        return counts / counts.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def forward(self, texts: list[str]) -> Tensor:
        return self.features(texts) @ self.weight + self.bias

    @torch.no_grad()
    def fit(self, texts: list[str], labels: Tensor, steps: int = 100) -> None:
        features, target = self.features(texts), labels.float()
        for _ in range(steps):
            wrong = torch.sigmoid(features @ self.weight + self.bias) - target
            self.weight -= 10 * features.T @ wrong / len(texts)

# %% wrong="quality_signals" because="only ASCII letters count as letters, not str.isalpha"
def quality_signals(text: str) -> dict[str, float]:
    words = text.split()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    n, m = max(len(words), 1), max(len(lines), 1)
    return {
        "words": len(words),
        "mean_word_length": sum(map(len, words)) / n,
        "hashes": text.count("#") / n,
        "ellipses": (text.count("...") + text.count("…")) / n,
        "bullet_lines": sum(line.startswith(BULLETS) for line in lines) / m,
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / m,
        "letter_words": sum(bool(re.search("[A-Za-z]", word)) for word in words) / n,
        "stop_words": len(set(STOP_WORDS) & set(words_of(text))),
    }

# %% wrong="quality_signals" because="counts words that hold a #"
def quality_signals(text: str) -> dict[str, float]:
    words = text.split()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    n_words, n_lines = max(len(words), 1), max(len(lines), 1)
    return {
        "words": len(words),
        "mean_word_length": sum(map(len, words)) / n_words,
        "hashes": sum("#" in word for word in words) / n_words,
        "ellipses": (text.count("...") + text.count("…")) / n_words,
        "bullet_lines": sum(line.startswith(BULLETS) for line in lines) / n_lines,
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / n_lines,
        "letter_words": sum(any(c.isalpha() for c in word) for word in words) / n_words,
        "stop_words": len(set(STOP_WORDS) & set(words_of(text))),
    }

# %% wrong="resumable_loader" because="digits of seed and epoch are joined: (1, 11) has the order of (11, 1)"
class ResumableLoader:
    def __init__(self, items: Sequence, batch: int, seed: int = 0, rank: int = 0, ranks: int = 1):
        if batch % ranks or not 0 <= rank < ranks or len(items) < batch:
            raise ValueError("ranks divide batch, 0 ≤ rank < ranks, items fill a batch")
        self.items, self.batch, self.rank, self.ranks = items, batch, rank, ranks
        self.seed, self.epoch, self.index = seed, 0, 0

    def __iter__(self) -> "ResumableLoader":
        return self

    def order(self) -> list[int]:
        generator = torch.Generator()
        generator.manual_seed(hash64(f"{self.seed}{self.epoch}") % 2**63)
        return torch.randperm(len(self.items), generator=generator).tolist()

    def __next__(self) -> list:
        if self.index >= len(self.items) // self.batch:
            self.epoch, self.index = self.epoch + 1, 0
        share = self.batch // self.ranks
        start = self.index * self.batch + self.rank * share
        self.index += 1
        return [self.items[i] for i in self.order()[start : start + share]]

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.epoch, self.index = state["seed"], state["epoch"], state["index"]

# %% right="resumable_loader" because="the epoch turns with its last batch, not with the next call"
class ResumableLoader:
    def __init__(self, items: Sequence, batch: int, seed: int = 0, rank: int = 0, ranks: int = 1):
        if batch % ranks or not 0 <= rank < ranks or len(items) < batch:
            raise ValueError("batch, rank and ranks do not go together")
        self.items, self.batch, self.rank, self.ranks = items, batch, rank, ranks
        self.seed, self.epoch, self.index = seed, 0, 0

    def __iter__(self) -> "ResumableLoader":
        return self

    def __next__(self) -> list:
        if self.index >= len(self.items) // self.batch:
            self.epoch, self.index = self.epoch + 1, 0
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.items))
        size = self.batch // self.ranks
        start = self.index * self.batch + self.rank * size
        part = [self.items[i] for i in order[start : start + size].tolist()]
        self.index += 1
        if self.index == len(self.items) // self.batch:
            self.epoch, self.index = self.epoch + 1, 0
        return part

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.epoch, self.index = state["seed"], state["epoch"], state["index"]

# %% wrong="s_curve" because="the logarithm of a number fails at similarity 1"
def s_curve(similarity, bands: int, rows: int):
    if isinstance(similarity, Tensor):
        return -torch.expm1(bands * torch.log1p(-(similarity**rows)))
    if isinstance(similarity, np.ndarray):
        return 1 - (1 - similarity**rows) ** bands
    return -math.expm1(bands * math.log1p(-(similarity**rows)))
