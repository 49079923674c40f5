# Right and wrong answers to the exercises of lesson 07: see CONTRIBUTING.md.

# %% wrong="utf8_encode" because="surrogates are written like other characters"
def utf8_encode(code_point):
    return chr(code_point).encode("utf-8", "surrogatepass")

# %% wrong="utf8_encode" because="four bytes from 0xFFFF on" base="four-bytes"
def utf8_encode(code_point):
    c = code_point
    if not 0 <= c <= 0x10FFFF or 0xD800 <= c <= 0xDFFF:
        raise ValueError("no character")
    if c < 0x80:
        return bytes([c])
    if c < 0x800:
        return bytes([0xC0 | c >> 6, 0x80 | c & 0x3F])
    if c < 0xFFFF:
        return bytes([0xE0 | c >> 12, 0x80 | c >> 6 & 0x3F, 0x80 | c & 0x3F])
    return bytes([0xF0 | c >> 18, 0x80 | c >> 12 & 0x3F, 0x80 | c >> 6 & 0x3F, 0x80 | c & 0x3F])

# %% wrong="utf8_encode" because="Latin-1: one byte up to 0xFF"
def utf8_encode(code_point):
    if not 0 <= code_point <= 0x10FFFF or 0xD800 <= code_point <= 0xDFFF:
        raise ValueError("no character")
    return bytes([code_point]) if code_point < 0x100 else chr(code_point).encode()

# %% wrong="utf8_encode" because="the last bits come first" of="four-bytes"
- if c < 0xFFFF:
-     return bytes([0xE0 | c >> 12, 0x80 | c >> 6 & 0x3F, 0x80 | c & 0x3F])
- return bytes([0xF0 | c >> 18, 0x80 | c >> 12 & 0x3F, 0x80 | c >> 6 & 0x3F, 0x80 | c & 0x3F])
+ if c < 0x10000:
+     return bytes([0xE0 | c >> 12, 0x80 | c & 0x3F, 0x80 | c >> 6 & 0x3F])
+ return bytes([0xF0 | c >> 18, 0x80 | c & 0x3F, 0x80 | c >> 6 & 0x3F, 0x80 | c >> 12 & 0x3F])

# %% wrong="utf8_encode" because="numbers beyond Unicode are accepted"
def utf8_encode(code_point):
    c = code_point
    if 0xD800 <= c <= 0xDFFF:
        raise ValueError("no character")
    if c < 0x80:
        return bytes([c & 0xFF])
    if c < 0x800:
        return bytes([0xC0 | c >> 6, 0x80 | c & 0x3F])
    if c < 0x10000:
        return bytes([0xE0 | c >> 12, 0x80 | c >> 6 & 0x3F, 0x80 | c & 0x3F])
    return bytes([0xF0 | c >> 18, 0x80 | c >> 12 & 0x3F, 0x80 | c >> 6 & 0x3F, 0x80 | c & 0x3F])

# %% right="utf8_encode" because="a case for each length" of="four-bytes"
- if not 0 <= c <= 0x10FFFF or 0xD800 <= c <= 0xDFFF:
+ if c < 0 or c > 0x10FFFF or c // 0x800 == 0x1B:

- if c < 0xFFFF:
+ if c < 0x10000:

# %% wrong="byte_symbols" because="chr of the byte"
def byte_symbols():
    return {byte: chr(byte) for byte in range(256)}

# %% wrong="byte_symbols" because="256 + byte instead of a running number"
def byte_symbols():
    keep = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return {byte: chr(byte if byte in keep else 256 + byte) for byte in range(256)}

# %% wrong="byte_symbols" because="the soft hyphen stays"
def byte_symbols():
    keep = {*range(33, 127), *range(161, 256)}
    rest = [byte for byte in range(256) if byte not in keep]
    return {byte: chr(byte) for byte in keep} | {byte: chr(256 + i) for i, byte in enumerate(rest)}

# %% wrong="byte_symbols" because="the tilde is replaced (a range that ends one early)"
def byte_symbols():
    keep = {*range(33, 126), *range(161, 173), *range(174, 256)}
    rest = [byte for byte in range(256) if byte not in keep]
    return {byte: chr(byte) for byte in keep} | {byte: chr(256 + i) for i, byte in enumerate(rest)}

# %% right="byte_symbols" because="what Python prints as it is, and the rest counted"
def byte_symbols():
    keep = [byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20]
    rest = [byte for byte in range(256) if byte not in keep]
    return {byte: chr(byte) for byte in keep} | {byte: chr(256 + i) for i, byte in enumerate(rest)}

# %% wrong="pre_tokenize" because="split at white space: the spaces are lost"
def pre_tokenize(text):
    return text.split()

# %% wrong="pre_tokenize" because="words and signs, without the leading space" base="words-signs"
def pre_tokenize(text):
    return re.findall(
        rf"'(?:[sdmt]|ll|ve|re)|[{LETTERS}]+|[{NUMBERS}]+|[^{SPACES}{LETTERS}{NUMBERS}]+|[{SPACES}]+",
        text,
    )

# %% wrong="pre_tokenize" because="the white space takes the space of the next word as well" of="words-signs"
- rf"'(?:[sdmt]|ll|ve|re)|[{LETTERS}]+|[{NUMBERS}]+|[^{SPACES}{LETTERS}{NUMBERS}]+|[{SPACES}]+",
+ rf"'(?:[sdmt]|ll|ve|re)| ?[{LETTERS}]+| ?[{NUMBERS}]+| ?[^{SPACES}{LETTERS}{NUMBERS}]+|[{SPACES}]+",

# %% wrong="pre_tokenize" because="only ASCII letters and digits"
def pre_tokenize(text):
    return re.findall(
        r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text
    )

# %% wrong="pre_tokenize" because="Python's word characters without digits for letters"
def pre_tokenize(text):
    return re.findall(
        r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text
    )

# %% wrong="pre_tokenize" because="Python's white space, which counts four control characters" of="words-signs"
- rf"'(?:[sdmt]|ll|ve|re)|[{LETTERS}]+|[{NUMBERS}]+|[^{SPACES}{LETTERS}{NUMBERS}]+|[{SPACES}]+",
+ rf"'(?:[sdmt]|ll|ve|re)| ?[{LETTERS}]+| ?[{NUMBERS}]+| ?[^\s{LETTERS}{NUMBERS}]+|\s+(?!\S)|\s+",

# %% wrong="pre_tokenize" because="contractions in capitals too"
def pre_tokenize(text):
    pattern = rf"(?i:'(?:[sdmt]|ll|ve|re))| ?[{LETTERS}]+| ?[{NUMBERS}]+| ?[^{SPACES}{LETTERS}{NUMBERS}]+|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+"
    return re.findall(pattern, text)

# %% wrong="pre_tokenize" because="no contractions" of="words-signs"
- rf"'(?:[sdmt]|ll|ve|re)|[{LETTERS}]+|[{NUMBERS}]+|[^{SPACES}{LETTERS}{NUMBERS}]+|[{SPACES}]+",
+ rf" ?[{LETTERS}]+| ?[{NUMBERS}]+| ?[^{SPACES}{LETTERS}{NUMBERS}]+|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+",

# %% wrong="pre_tokenize" because="the library's own"
def pre_tokenize(text):
    return library_pieces(text)

# %% wrong="pre_tokenize" because="a capturing group: findall returns the groups" of="words-signs"
- rf"'(?:[sdmt]|ll|ve|re)|[{LETTERS}]+|[{NUMBERS}]+|[^{SPACES}{LETTERS}{NUMBERS}]+|[{SPACES}]+",
+ rf"'([sdmt]|ll|ve|re)| ?[{LETTERS}]+| ?[{NUMBERS}]+| ?[^{SPACES}{LETTERS}{NUMBERS}]+|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+",

# %% right="pre_tokenize" because="a scanner by hand"
def pre_tokenize(text):
    def kind(c):
        if (
            c in "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
            or "\u2000" <= c <= "\u200a"
        ):
            return "space"
        return {"L": "letter", "N": "number"}.get(unicodedata.category(c)[0], "sign")

    pieces, i = [], 0
    while i < len(text):
        contraction = next(
            (c for c in ("'s", "'d", "'m", "'t", "'ll", "'ve", "'re") if text.startswith(c, i)),
            None,
        )
        if contraction:
            end = i + len(contraction)
        else:
            start = (
                i + 1
                if text[i] == " " and i + 1 < len(text) and kind(text[i + 1]) != "space"
                else i
            )
            first, end = kind(text[start]), start
            while end < len(text) and kind(text[end]) == first:
                end += 1
            if first == "space" and end < len(text) and end - i > 1:
                end -= 1
        pieces.append(text[i:end])
        i = end
    return pieces

# %% wrong="merge_pair" because="overlapping occurrences are merged twice"
def merge_pair(symbols, pair, merged):
    out = []
    for i, symbol in enumerate(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            out.append(merged)
        elif not (i and tuple(symbols[i - 1 : i + 1]) == pair):
            out.append(symbol)
    return out

# %% wrong="merge_pair" because="only the first occurrence"
def merge_pair(symbols, pair, merged):
    for i in range(len(symbols) - 1):
        if (symbols[i], symbols[i + 1]) == pair:
            return symbols[:i] + [merged] + symbols[i + 2 :]
    return list(symbols)

# %% wrong="merge_pair" because="the list is changed in place"
def merge_pair(symbols, pair, merged):
    i = 0
    while i + 1 < len(symbols):
        if (symbols[i], symbols[i + 1]) == pair:
            symbols[i : i + 2] = [merged]
        i += 1
    return symbols

# %% wrong="merge_pair" because="from right to left"
def merge_pair(symbols, pair, merged):
    out, i = [], len(symbols) - 1
    while i >= 0:
        if i > 0 and (symbols[i - 1], symbols[i]) == pair:
            out.append(merged)
            i -= 2
        else:
            out.append(symbols[i])
            i -= 1
    return out[::-1]

# %% wrong="merge_pair" because="the merged symbol is looked at again"
def merge_pair(symbols, pair, merged):
    out = list(symbols)
    i = 0
    while i + 1 < len(out):
        if (out[i], out[i + 1]) == pair:
            out[i : i + 2] = [merged]
        else:
            i += 1
    return out

# %% wrong="merge_pair" because="the last symbol is lost"
def merge_pair(symbols, pair, merged):
    out, i = [], 0
    while i + 1 < len(symbols):
        if (symbols[i], symbols[i + 1]) == pair:
            out.append(merged)
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out

# %% right="merge_pair" because="a stack of what is still to come"
def merge_pair(symbols, pair, merged):
    out, rest = [], list(symbols)[::-1]
    while rest:
        symbol = rest.pop()
        if rest and (symbol, rest[-1]) == pair:
            rest.pop()
            symbol = merged
        out.append(symbol)
    return out

# %% wrong="train_bpe" because="everything is counted again before each merge" base="everything-counted"
def train_bpe(text, vocab_size, special_tokens):
    wanted = vocab_size - 256 - len(special_tokens)
    if wanted < 0:
        raise ValueError("too small")
    parts = (
        re.split(
            "|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True)), text
        )
        if special_tokens
        else [text]
    )
    frequency = Counter(piece for part in parts for piece in pre_tokenize(part))
    words = {piece: list(piece.encode()) for piece in frequency}
    tokens, merges = [bytes([b]) for b in range(256)], []
    while len(merges) < wanted:
        counts = Counter()
        for piece, word in words.items():
            for pair in pairwise(word):
                counts[pair] += frequency[piece]
        counts = {p: c for p, c in counts.items() if tokens[p[0]] + tokens[p[1]] not in tokens}
        if not counts:
            break
        best = min(counts, key=lambda p: (-counts[p], p))
        merges.append((tokens[best[0]], tokens[best[1]]))
        words = {piece: merge_pair(word, best, len(tokens)) for piece, word in words.items()}
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return merges

# %% wrong="train_bpe" because="counts are updated, but all words are searched for the pair"
def train_bpe(text, vocab_size, special_tokens):
    wanted = vocab_size - 256 - len(special_tokens)
    if wanted < 0:
        raise ValueError("too small")
    parts = (
        re.split(
            "|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True)), text
        )
        if special_tokens
        else [text]
    )
    frequency = Counter(piece for part in parts for piece in pre_tokenize(part))
    words = [(list(piece.encode()), n) for piece, n in frequency.items()]
    counts = Counter()
    for word, n in words:
        for pair in pairwise(word):
            counts[pair] += n
    tokens, merges = [bytes([b]) for b in range(256)], []
    while len(merges) < wanted:
        left = [p for p in counts if counts[p] > 0 and tokens[p[0]] + tokens[p[1]] not in tokens]
        if not left:
            break
        best = min(left, key=lambda p: (-counts[p], p))
        merges.append((tokens[best[0]], tokens[best[1]]))
        for w in [w for w, (word, _) in enumerate(words) if best in pairwise(word)]:
            word, n = words[w]
            for pair in pairwise(word):
                counts[pair] -= n
            word = merge_pair(word, best, len(tokens))
            for pair in pairwise(word):
                counts[pair] += n
            words[w] = (word, n)
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return merges

# %% wrong="train_bpe" because="the pair seen first wins a tie" of="everything-counted"
- best = min(counts, key=lambda p: (-counts[p], p))
+ best = max(counts, key=counts.get)

# %% wrong="train_bpe" because="ties by the bytes, the greatest pair first (CS336's rule)" of="everything-counted"
- words = {piece: list(piece.encode()) for piece in frequency}
- tokens, merges = [bytes([b]) for b in range(256)], []
+ words = {piece: [bytes([b]) for b in piece.encode()] for piece in frequency}
+ merges = []

- counts = {p: c for p, c in counts.items() if tokens[p[0]] + tokens[p[1]] not in tokens}

- best = min(counts, key=lambda p: (-counts[p], p))
- merges.append((tokens[best[0]], tokens[best[1]]))
- words = {piece: merge_pair(word, best, len(tokens)) for piece, word in words.items()}
- tokens.append(tokens[best[0]] + tokens[best[1]])
+ best = max(counts, key=lambda p: (counts[p], p))
+ merges.append(best)
+ words = {piece: merge_pair(word, best, best[0] + best[1]) for piece, word in words.items()}

# %% wrong="train_bpe" because="the neighbors that a merge destroys keep their counts"
def train_bpe(text, vocab_size, special_tokens):
    wanted = vocab_size - 256 - len(special_tokens)
    if wanted < 0:
        raise ValueError("too small")
    parts = (
        re.split(
            "|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True)), text
        )
        if special_tokens
        else [text]
    )
    frequency = Counter(piece for part in parts for piece in pre_tokenize(part))
    words, times = [list(piece.encode()) for piece in frequency], list(frequency.values())
    counts, where = Counter(), defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += times[w]
            where[pair].add(w)
    tokens, merges, known = [bytes([b]) for b in range(256)], [], set()
    while counts and len(merges) < wanted:
        best = min(counts, key=lambda p: (-counts[p], p))
        del counts[best]
        if tokens[best[0]] + tokens[best[1]] in known:
            continue
        new = len(tokens)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        known.add(tokens[-1])
        merges.append((tokens[best[0]], tokens[best[1]]))
        for w in where[best]:
            words[w] = merge_pair(words[w], best, new)
            for pair in pairwise(words[w]):
                if new in pair:
                    counts[pair] += times[w]
                    where[pair].add(w)
    return merges

# %% wrong="train_bpe" because="words are counted once, however often they occur" base="words-are"
def train_bpe(text, vocab_size, special_tokens):
    wanted = vocab_size - 256 - len(special_tokens)
    if wanted < 0:
        raise ValueError("too small")
    parts = (
        re.split(
            "|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True)), text
        )
        if special_tokens
        else [text]
    )
    words = [
        list(piece.encode())
        for piece in dict.fromkeys(piece for part in parts for piece in pre_tokenize(part))
    ]
    tokens, merges = [bytes([b]) for b in range(256)], []
    while len(merges) < wanted:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda p: (-counts[p], p))
        merges.append((tokens[best[0]], tokens[best[1]]))
        words = [merge_pair(word, best, len(tokens)) for word in words]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return merges

# %% wrong="train_bpe" because="merges cross the borders of the pieces" of="words-are"
- words = [
-     list(piece.encode())
-     for piece in dict.fromkeys(piece for part in parts for piece in pre_tokenize(part))
- ]
+ words = [list(part.encode()) for part in parts]

# %% wrong="train_bpe" because="overlaps are counted once: aaa has one pair (a, a)" of="everything-counted"
- for pair in pairwise(word):
-     counts[pair] += frequency[piece]
+ for pair in set(pairwise(word)):
+     counts[pair] += frequency[piece] * (len(word) - len(merge_pair(word, pair, None)))

# %% wrong="train_bpe" because="special tokens are ordinary text in training" of="everything-counted"
- parts = (
-     re.split(
-         "|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True)), text
-     )
-     if special_tokens
-     else [text]
- )
- frequency = Counter(piece for part in parts for piece in pre_tokenize(part))
+ frequency = Counter(pre_tokenize(text))

# %% wrong="train_bpe" because="special tokens are not escaped in the expression" of="everything-counted"
- parts = (
-     re.split(
-         "|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True)), text
-     )
-     if special_tokens
-     else [text]
- )
+ parts = re.split("|".join(special_tokens), text) if special_tokens else [text]

# %% wrong="train_bpe" because="the shorter of two special tokens is cut out first" of="everything-counted"
- parts = (
-     re.split(
-         "|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True)), text
-     )
-     if special_tokens
-     else [text]
- )
+ parts = [text]
+ for special in sorted(special_tokens, key=len):
+     parts = [piece for part in parts for piece in part.split(special)]

# %% wrong="train_bpe" because="special tokens take no place in the vocabulary" of="everything-counted"
- wanted = vocab_size - 256 - len(special_tokens)
- if wanted < 0:
-     raise ValueError("too small")

- while len(merges) < wanted:
+ while len(tokens) < vocab_size:

# %% wrong="train_bpe" because="characters instead of bytes"
def train_bpe(text, vocab_size, special_tokens):
    wanted = vocab_size - 256 - len(special_tokens)
    if wanted < 0:
        raise ValueError("too small")
    parts = (
        re.split(
            "|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True)), text
        )
        if special_tokens
        else [text]
    )
    frequency = Counter(piece for part in parts for piece in pre_tokenize(part))
    words = {piece: [c.encode() for c in piece] for piece in frequency}
    age = {bytes([b]): b for b in range(256)}
    for word in words.values():
        for symbol in word:
            age.setdefault(symbol, len(age))
    merges = []
    while len(merges) < wanted:
        counts = Counter()
        for piece, word in words.items():
            for pair in pairwise(word):
                counts[pair] += frequency[piece]
        counts = {p: c for p, c in counts.items() if p[0] + p[1] not in age}
        if not counts:
            break
        best = min(counts, key=lambda p: (-counts[p], age[p[0]], age[p[1]]))
        age[best[0] + best[1]] = len(age)
        merges.append(best)
        words = {piece: merge_pair(word, best, best[0] + best[1]) for piece, word in words.items()}
    return merges

# %% right="train_bpe" because="a max over all pairs, and only the five changes around each place"
def train_bpe(text, vocab_size, special_tokens):
    wanted = vocab_size - 256 - len(special_tokens)
    if wanted < 0:
        raise ValueError("too small")
    parts = [text]
    for special in sorted(special_tokens, key=len, reverse=True):
        parts = [piece for part in parts for piece in part.split(special)]
    frequency = Counter()
    for part in parts:
        frequency.update(library_pieces(part))
    words = [[list(piece.encode()), times] for piece, times in frequency.items()]
    counts, where = defaultdict(int), defaultdict(set)
    for w, (word, times) in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += times
            where[pair].add(w)
    tokens = [bytes([b]) for b in range(256)]
    merges = []
    while len(merges) < wanted:
        alive = [pair for pair in counts if counts[pair] > 0]
        if not alive:
            break
        best = min(alive, key=lambda pair: (-counts[pair], pair))
        left, right = best
        if tokens[left] + tokens[right] in tokens:
            del counts[best]
            continue
        new = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        merges.append((tokens[left], tokens[right]))
        for w in where[best]:
            word, times = words[w]
            out, i = [], 0
            while i < len(word):
                if i + 1 < len(word) and word[i] == left and word[i + 1] == right:
                    counts[best] -= times
                    if out:
                        counts[out[-1], left] -= times
                        counts[out[-1], new] += times
                        where[out[-1], new].add(w)
                    if i + 2 < len(word):
                        counts[right, word[i + 2]] -= times
                        counts[new, word[i + 2]] += times
                        where[new, word[i + 2]].add(w)
                    out.append(new)
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            words[w][0] = out
        del counts[best]
    return merges

# %% wrong="train_bpe" because="special tokens are tried in the order in which they are given"
- borders = "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True))
+ borders = "|".join(re.escape(token) for token in special_tokens)

# %% wrong="encode" because="the first pair from the left" base="first-pair"
def encode(text, tokenizer, special=True):
    parts = (
        re.split(
            "("
            + "|".join(re.escape(t) for t in sorted(tokenizer.special, key=len, reverse=True))
            + ")",
            text,
        )
        if special and tokenizer.special
        else [text]
    )
    ids = []
    for i, part in enumerate(parts):
        if i % 2:
            ids.append(tokenizer.special[part])
            continue
        for piece in pre_tokenize(part):
            symbols = [bytes([b]) for b in piece.encode()]
            while True:
                pair = next((p for p in pairwise(symbols) if p in tokenizer.ranks), None)
                if pair is None:
                    break
                symbols = merge_pair(symbols, pair, pair[0] + pair[1])
            ids += [tokenizer.ids[s] for s in symbols]
    return ids

# %% wrong="encode" because="the longest token that fits, from the left" of="first-pair"
- symbols = [bytes([b]) for b in piece.encode()]
- while True:
-     pair = next((p for p in pairwise(symbols) if p in tokenizer.ranks), None)
-     if pair is None:
-         break
-     symbols = merge_pair(symbols, pair, pair[0] + pair[1])
- ids += [tokenizer.ids[s] for s in symbols]
+ raw = piece.encode()
+ while raw:
+     n = next(n for n in range(len(raw), 0, -1) if raw[:n] in tokenizer.ids)
+     ids.append(tokenizer.ids[raw[:n]])
+     raw = raw[n:]

# %% wrong="encode" because="merges cross the borders of the pieces" of="first-pair"
- for piece in pre_tokenize(part):
-     symbols = [bytes([b]) for b in piece.encode()]
-     while True:
-         pair = next((p for p in pairwise(symbols) if p in tokenizer.ranks), None)
-         if pair is None:
-             break
-         symbols = merge_pair(symbols, pair, pair[0] + pair[1])
-     ids += [tokenizer.ids[s] for s in symbols]
+ symbols = [bytes([b]) for b in part.encode()]
+ for pair in tokenizer.merges:
+     symbols = merge_pair(symbols, pair, pair[0] + pair[1])
+ ids += [tokenizer.ids[s] for s in symbols]

# %% wrong="encode" because="special tokens are found even where special is False" of="first-pair"
- if special and tokenizer.special
+ if tokenizer.special

- while True:
-     pair = next((p for p in pairwise(symbols) if p in tokenizer.ranks), None)
-     if pair is None:
-         break
+ for pair in tokenizer.merges:

# %% wrong="encode" because="special tokens are split by the expression before they are looked for"
def encode(text, tokenizer, special=True):
    ids = []
    for piece in pre_tokenize(text):
        if special and piece in tokenizer.special:
            ids.append(tokenizer.special[piece])
            continue
        symbols = [bytes([b]) for b in piece.encode()]
        for pair in tokenizer.merges:
            symbols = merge_pair(symbols, pair, pair[0] + pair[1])
        ids += [tokenizer.ids[s] for s in symbols]
    return ids

# %% wrong="encode" because="the shorter special token first" of="first-pair"
- "("
- + "|".join(re.escape(t) for t in sorted(tokenizer.special, key=len, reverse=True))
- + ")",
- text,
+ "(" + "|".join(re.escape(t) for t in sorted(tokenizer.special, key=len)) + ")", text

- while True:
-     pair = next((p for p in pairwise(symbols) if p in tokenizer.ranks), None)
-     if pair is None:
-         break
+ for pair in tokenizer.merges:

# %% wrong="encode" because="special tokens are not escaped"
def encode(text, tokenizer, special=True):
    parts = (
        re.split("(" + "|".join(sorted(tokenizer.special, key=len, reverse=True)) + ")", text)
        if special and tokenizer.special
        else [text]
    )
    ids = []
    for part in parts:
        if special and part in tokenizer.special:
            ids.append(tokenizer.special[part])
            continue
        for piece in pre_tokenize(part or ""):
            symbols = [bytes([b]) for b in piece.encode()]
            for pair in tokenizer.merges:
                symbols = merge_pair(symbols, pair, pair[0] + pair[1])
            ids += [tokenizer.ids[s] for s in symbols]
    return ids

# %% wrong="encode" because="characters that are no single byte are dropped" of="first-pair"
- symbols = [bytes([b]) for b in piece.encode()]
- while True:
-     pair = next((p for p in pairwise(symbols) if p in tokenizer.ranks), None)
-     if pair is None:
-         break
+ symbols = [c.encode() for c in piece]
+ for pair in tokenizer.merges:

- ids += [tokenizer.ids[s] for s in symbols]
+ ids += [tokenizer.ids[s] for s in symbols if s in tokenizer.ids]

# %% wrong="encode" because="one merge for each piece, then it stops" of="first-pair"
- while True:
-     pair = next((p for p in pairwise(symbols) if p in tokenizer.ranks), None)
-     if pair is None:
-         break
-     symbols = merge_pair(symbols, pair, pair[0] + pair[1])
+ pairs = [p for p in pairwise(symbols) if p in tokenizer.ranks]
+ if pairs:
+     best = min(pairs, key=tokenizer.ranks.get)
+     symbols = merge_pair(symbols, best, best[0] + best[1])

# %% wrong="encode" because="the highest rank first" of="first-pair"
- pair = next((p for p in pairwise(symbols) if p in tokenizer.ranks), None)
- if pair is None:
+ pairs = [p for p in pairwise(symbols) if p in tokenizer.ranks]
+ if not pairs:

- symbols = merge_pair(symbols, pair, pair[0] + pair[1])
+ best = max(pairs, key=tokenizer.ranks.get)
+ symbols = merge_pair(symbols, best, best[0] + best[1])

# %% right="encode" because="every merge of the list, in order"
def encode(text, tokenizer, special=True):
    def ordinary(part):
        ids = []
        for piece in library_pieces(part):
            symbols = [bytes([b]) for b in piece.encode()]
            for left, right in tokenizer.merges:
                i = 0
                while i + 1 < len(symbols):
                    if symbols[i] == left and symbols[i + 1] == right:
                        symbols[i : i + 2] = [left + right]
                    i += 1
            ids += [tokenizer.ids[symbol] for symbol in symbols]
        return ids

    if not special or not tokenizer.special:
        return ordinary(text)
    ids, start, i = [], 0, 0
    longest_first = sorted(tokenizer.special, key=lambda token: -len(token))
    while i < len(text):
        token = next((token for token in longest_first if text.startswith(token, i)), None)
        if token is None:
            i += 1
            continue
        ids += ordinary(text[start:i]) + [tokenizer.special[token]]
        i += len(token)
        start = i
    return ids + ordinary(text[start:])

# %% wrong="decode" because="errors='strict' raises" base="errors-strict"
def decode(ids, tokenizer):
    texts = {i: t.encode() for t, i in tokenizer.special.items()}
    if any(not 0 <= i < len(tokenizer) for i in ids):
        raise ValueError("no such id")
    return b"".join(texts[i] if i in texts else tokenizer.tokens[i] for i in ids).decode()

# %% wrong="decode" because="errors='ignore' drops the broken bytes" of="errors-strict"
- return b"".join(texts[i] if i in texts else tokenizer.tokens[i] for i in ids).decode()
+ return b"".join(texts[i] if i in texts else tokenizer.tokens[i] for i in ids).decode(
+     errors="ignore"
+ )

# %% wrong="decode" because="each token is decoded by itself"
def decode(ids, tokenizer):
    texts = {i: t for t, i in tokenizer.special.items()}
    if any(not 0 <= i < len(tokenizer) for i in ids):
        raise ValueError("no such id")
    return "".join(
        texts[i] if i in texts else tokenizer.tokens[i].decode(errors="replace") for i in ids
    )

# %% wrong="decode" because="a negative id counts from the end"
def decode(ids, tokenizer):
    tokens = tokenizer.tokens + [t.encode() for t in tokenizer.special]
    try:
        return b"".join(tokens[i] for i in ids).decode(errors="replace")
    except IndexError:
        raise ValueError("no such id") from None

# %% wrong="decode" because="special tokens are left out"
def decode(ids, tokenizer):
    if any(not 0 <= i < len(tokenizer) for i in ids):
        raise ValueError("no such id")
    return b"".join(tokenizer.tokens[i] for i in ids if i < len(tokenizer.tokens)).decode(
        errors="replace"
    )

# %% wrong="decode" because="unknown ids are skipped" base="unknown-ids"
def decode(ids, tokenizer):
    tokens = dict(enumerate(tokenizer.tokens)) | {
        i: t.encode() for t, i in tokenizer.special.items()
    }
    return b"".join(tokens.get(i, b"") for i in ids).decode(errors="replace")

# %% wrong="decode" because="Latin-1" of="unknown-ids"
- return b"".join(tokens.get(i, b"") for i in ids).decode(errors="replace")
+ if any(i not in tokens for i in ids):
+     raise ValueError("no such id")
+ return b"".join(tokens[i] for i in ids).decode("latin-1")

# %% right="decode" because="a bytearray and an incremental decoder"
def decode(ids, tokenizer):
    import codecs

    special = {i: token for token, i in tokenizer.special.items()}
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    out = []
    for i in ids:
        if i in special:
            out.append(decoder.decode(special[i].encode()))
        elif 0 <= i < len(tokenizer.tokens):
            out.append(decoder.decode(tokenizer.tokens[i]))
        else:
            raise ValueError(f"no id {i}")
    return "".join(out) + decoder.decode(b"", final=True)

# %% wrong="encode_chat" because="one string, encoded with its special tokens"
def encode_chat(messages, tokenizer):
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(message["role"])
    text = "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>" for m in messages)
    return encode(text, tokenizer)

# %% wrong="encode_chat" because="control tokens are removed from the content"
def encode_chat(messages, tokenizer):
    ids = []
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(message["role"])
        content = message["content"]
        for token in tokenizer.special:
            content = content.replace(token, "")
        ids += [
            tokenizer.special["<|start|>"],
            *encode(message["role"] + "\n", tokenizer, False),
            *encode(content, tokenizer, True),
            tokenizer.special["<|end|>"],
        ]
    return ids

# %% wrong="encode_chat" because="control tokens are encoded as text as well"
def encode_chat(messages, tokenizer):
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(message["role"])
    return encode(
        "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>" for m in messages),
        tokenizer,
        special=False,
    )

# %% wrong="encode_chat" because="any role is accepted" base="any-role"
def encode_chat(messages, tokenizer):
    ids = []
    for message in messages:
        text = message["role"] + "\n" + message["content"]
        ids += [
            tokenizer.special["<|start|>"],
            *encode(text, tokenizer, False),
            tokenizer.special["<|end|>"],
        ]
    return ids

# %% wrong="encode_chat" because="the newline after the role is missing" of="any-role"
- text = message["role"] + "\n" + message["content"]
+ if message["role"] not in ("system", "user", "assistant"):
+     raise ValueError(message["role"])
+ text = message["role"] + message["content"]

# %% wrong="encode_chat" because="role and content in one text, where a token may join the two"
def encode_chat(messages, tokenizer):
    ids = []
    for message in messages:
        if message["role"] not in {"system", "user", "assistant"}:
            raise ValueError(message["role"])
        ids.append(tokenizer.special["<|start|>"])
        ids.extend(encode(f"{message['role']}\n{message['content']}", tokenizer, special=False))
        ids.append(tokenizer.special["<|end|>"])
    return ids

# %% wrong="wordpiece_tokenize" because="continuations without ##"
def wordpiece_tokenize(word, vocab, unknown="[UNK]", max_characters=100):
    if len(word) > max_characters:
        return [unknown]
    pieces, start = [], 0
    while start < len(word):
        end = next(
            (
                e
                for e in range(len(word), start, -1)
                if word[start:e] in vocab or (start and "##" + word[start:e] in vocab)
            ),
            None,
        )
        if end is None:
            return [unknown]
        pieces.append(word[start:end])
        start = end
    return pieces

# %% wrong="wordpiece_tokenize" because="only the rest becomes unknown" base="only-rest"
def wordpiece_tokenize(word, vocab, unknown="[UNK]", max_characters=100):
    if len(word) > max_characters:
        return [unknown]
    pieces, start = [], 0
    while start < len(word):
        mark = "##" if start else ""
        end = next((e for e in range(len(word), start, -1) if mark + word[start:e] in vocab), None)
        if end is None:
            return pieces + [unknown]
        pieces.append(mark + word[start:end])
        start = end
    return pieces

# %% wrong="wordpiece_tokenize" because="the shortest match" of="only-rest"
- end = next((e for e in range(len(word), start, -1) if mark + word[start:e] in vocab), None)
+ end = next(
+     (e for e in range(start + 1, len(word) + 1) if mark + word[start:e] in vocab), None
+ )

- return pieces + [unknown]
+ return [unknown]

# %% wrong="wordpiece_tokenize" because="goes back when the longest leads nowhere"
def wordpiece_tokenize(word, vocab, unknown="[UNK]", max_characters=100):
    if len(word) > max_characters:
        return [unknown]

    def cut(start):
        if start == len(word):
            return []
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocab and (rest := cut(end)) is not None:
                return [piece, *rest]
        return None

    found = cut(0)
    return [unknown] if found is None else found

# %% wrong="wordpiece_tokenize" because="a single character is skipped where nothing fits" of="only-rest"
- return pieces + [unknown]
+ start += 1
+ continue

- return pieces
+ return pieces or ([unknown] if word else [])

# %% wrong="wordpiece_tokenize" because="words of exactly the longest length are unknown" of="only-rest"
- if len(word) > max_characters:
+ if len(word) >= max_characters:

- return pieces + [unknown]
+ return [unknown]

# %% right="wordpiece_tokenize" because="shortening the rest from its end"
def wordpiece_tokenize(word, vocab, unknown="[UNK]", max_characters=100):
    if len(word) > max_characters:
        return [unknown]
    pieces, mark, rest = [], "", word
    while rest:
        prefix = rest
        while prefix and mark + prefix not in vocab:
            prefix = prefix[:-1]
        if not prefix:
            return [unknown]
        pieces.append(mark + prefix)
        mark, rest = "##", rest[len(prefix) :]
    return pieces

# %% wrong="unigram_viterbi" because="greedy: the longest token from the left"
def unigram_viterbi(text, log_probs):
    tokens, score, i = [], 0.0, 0
    longest = max(map(len, log_probs), default=0)
    while i < len(text):
        j = next(
            (j for j in range(min(len(text), i + longest), i, -1) if text[i:j] in log_probs), None
        )
        if j is None:
            raise ValueError("no segmentation")
        tokens.append(text[i:j])
        score += log_probs[text[i:j]]
        i = j
    return tokens, score

# %% wrong="unigram_viterbi" because="greedy: the most probable token from the left"
def unigram_viterbi(text, log_probs):
    tokens, score, i = [], 0.0, 0
    longest = max(map(len, log_probs), default=0)
    while i < len(text):
        fits = [
            text[i:j]
            for j in range(i + 1, min(len(text), i + longest) + 1)
            if text[i:j] in log_probs
        ]
        if not fits:
            raise ValueError("no segmentation")
        token = max(fits, key=log_probs.get)
        tokens.append(token)
        score += log_probs[token]
        i += len(token)
    return tokens, score

# %% wrong="unigram_viterbi" because="log-probabilities are multiplied"
def unigram_viterbi(text, log_probs):
    n = len(text)
    longest = max(map(len, log_probs), default=0)
    best = [([], 1.0)] + [None] * n
    for j in range(1, n + 1):
        for i in range(max(0, j - longest), j):
            if best[i] and text[i:j] in log_probs:
                score = -abs(best[i][1] * log_probs[text[i:j]])
                if best[j] is None or score > best[j][1]:
                    best[j] = (best[i][0] + [text[i:j]], score)
    if best[n] is None:
        raise ValueError("no segmentation")
    return best[n]

# %% wrong="unigram_viterbi" because="unreachable places score 0"
def unigram_viterbi(text, log_probs):
    longest = max(map(len, log_probs), default=0)
    score, begin = [0.0] * (len(text) + 1), [None] * (len(text) + 1)
    for j in range(1, len(text) + 1):
        fits = [
            (score[i] + log_probs[text[i:j]], i)
            for i in range(max(0, j - longest), j)
            if text[i:j] in log_probs
        ]
        if fits:
            score[j], begin[j] = max(fits)
    tokens, j = [], len(text)
    while j:
        if begin[j] is None:
            raise ValueError("no segmentation")
        tokens.append(text[begin[j] : j])
        j = begin[j]
    return tokens[::-1], score[-1]

# %% wrong="unigram_viterbi" because="fewest tokens instead of most probable"
def unigram_viterbi(text, log_probs):
    longest = max(map(len, log_probs), default=0)
    best = [(0, 0.0, None)] + [None] * len(text)
    for j in range(1, len(text) + 1):
        fits = [
            (best[i][0] + 1, -best[i][1] - log_probs[text[i:j]], i)
            for i in range(max(0, j - longest), j)
            if best[i] and text[i:j] in log_probs
        ]
        if fits:
            n, minus, i = min(fits)
            best[j] = (n, -minus, i)
    if best[-1] is None:
        raise ValueError("no segmentation")
    tokens, j = [], len(text)
    while j:
        tokens.append(text[best[j][2] : j])
        j = best[j][2]
    return tokens[::-1], best[-1][1]

# %% wrong="unigram_viterbi" because="recursive, without a memory"
def unigram_viterbi(text, log_probs):
    if not text:
        return [], 0.0
    best = None
    for n in range(1, len(text) + 1):
        if text[:n] in log_probs:
            try:
                tokens, score = unigram_viterbi(text[n:], log_probs)
            except ValueError:
                continue
            if best is None or score + log_probs[text[:n]] > best[1]:
                best = [text[:n], *tokens], score + log_probs[text[:n]]
    if best is None:
        raise ValueError("no segmentation")
    return best

# %% wrong="unigram_viterbi" because="all starting points, not only those within the longest token"
def unigram_viterbi(text, log_probs):
    score = [0.0] + [-math.inf] * len(text)
    begin = [0] * (len(text) + 1)
    for j in range(1, len(text) + 1):
        for i in range(j):
            candidate = score[i] + log_probs.get(text[i:j], -math.inf)
            if candidate > score[j]:
                score[j], begin[j] = candidate, i
    if score[-1] == -math.inf:
        raise ValueError("no segmentation")
    tokens, j = [], len(text)
    while j:
        tokens.append(text[begin[j] : j])
        j = begin[j]
    return tokens[::-1], score[-1]

# %% wrong="unigram_viterbi" because="a probability instead of its logarithm"
def unigram_viterbi(text, log_probs):
    longest = max(map(len, log_probs), default=0)
    score, begin = [0.0] + [-math.inf] * len(text), [0] * (len(text) + 1)
    for j in range(1, len(text) + 1):
        for i in range(max(0, j - longest), j):
            candidate = score[i] + log_probs.get(text[i:j], -math.inf)
            if candidate > score[j]:
                score[j], begin[j] = candidate, i
    if score[-1] == -math.inf:
        raise ValueError("no segmentation")
    tokens, j = [], len(text)
    while j:
        tokens.append(text[begin[j] : j])
        j = begin[j]
    return tokens[::-1], math.exp(score[-1])

# %% right="unigram_viterbi" because="forwards: each place hands its score on"
def unigram_viterbi(text, log_probs):
    lengths = sorted({len(token) for token in log_probs if len(token) <= len(text)})
    best = {0: (0.0, None)}
    for i in range(len(text)):
        if i not in best:
            continue
        for n in lengths:
            token = text[i : i + n]
            if len(token) == n and token in log_probs:
                score = best[i][0] + log_probs[token]
                if i + n not in best or score > best[i + n][0]:
                    best[i + n] = (score, token)
    if len(text) not in best:
        raise ValueError("no segmentation")
    tokens, j = [], len(text)
    while j > 0:
        tokens.insert(0, best[j][1])
        j -= len(best[j][1])
    return tokens, best[len(text)][0]

# %% wrong="unigram_expected_counts" because="the counts of the best segmentation"
def unigram_expected_counts(text, log_probs):
    tokens, score = unigram_viterbi(text, log_probs)
    return score, dict(Counter(tokens))

# %% wrong="unigram_expected_counts" because="not divided by Z"
def unigram_expected_counts(text, log_probs):
    n = len(text)
    alpha, beta = [1.0] + [0.0] * n, [0.0] * n + [1.0]
    p = {t: math.exp(v) for t, v in log_probs.items()}
    for j in range(1, n + 1):
        alpha[j] = sum(alpha[i] * p.get(text[i:j], 0.0) for i in range(j))
    for i in range(n - 1, -1, -1):
        beta[i] = sum(p.get(text[i:j], 0.0) * beta[j] for j in range(i + 1, n + 1))
    if not alpha[n]:
        raise ValueError("no segmentation")
    counts = defaultdict(float)
    for i in range(n):
        for j in range(i + 1, n + 1):
            if text[i:j] in p:
                counts[text[i:j]] += alpha[i] * p[text[i:j]] * beta[j]
    return math.log(alpha[n]), dict(counts)

# %% wrong="unigram_expected_counts" because="probabilities without logarithms underflow"
def unigram_expected_counts(text, log_probs):
    n, longest = len(text), max(map(len, log_probs), default=0)
    alpha, beta = [1.0] + [0.0] * n, [0.0] * n + [1.0]
    p = {t: math.exp(v) for t, v in log_probs.items()}
    for j in range(1, n + 1):
        alpha[j] = sum(alpha[i] * p.get(text[i:j], 0.0) for i in range(max(0, j - longest), j))
    for i in range(n - 1, -1, -1):
        beta[i] = sum(
            p.get(text[i:j], 0.0) * beta[j] for j in range(i + 1, min(n, i + longest) + 1)
        )
    if not alpha[n]:
        raise ValueError("no segmentation")
    counts = defaultdict(float)
    for i in range(n):
        for j in range(i + 1, min(n, i + longest) + 1):
            if text[i:j] in p:
                counts[text[i:j]] += alpha[i] * p[text[i:j]] * beta[j] / alpha[n]
    return math.log(alpha[n]), dict(counts)

# %% wrong="unigram_expected_counts" because="counts over places that lead nowhere: no backward pass"
def unigram_expected_counts(text, log_probs):
    n, longest = len(text), max(map(len, log_probs), default=0)
    alpha = [0.0] + [-math.inf] * n
    counts = defaultdict(float)
    for j in range(1, n + 1):
        terms = {
            text[i:j]: alpha[i] + log_probs[text[i:j]]
            for i in range(max(0, j - longest), j)
            if text[i:j] in log_probs and alpha[i] > -math.inf
        }
        if terms:
            top = max(terms.values())
            alpha[j] = top + math.log(sum(math.exp(t - top) for t in terms.values()))
            for token, term in terms.items():
                counts[token] += math.exp(term - alpha[j])
    if alpha[n] == -math.inf:
        raise ValueError("no segmentation")
    return alpha[n], dict(counts)

# %% wrong="unigram_expected_counts" because="a token counts once, however often it occurs"
def unigram_expected_counts(text, log_probs):
    n, longest = len(text), max(map(len, log_probs), default=0)

    def log_sum(terms):
        top = max(terms, default=-math.inf)
        return top if top == -math.inf else top + math.log(sum(math.exp(t - top) for t in terms))

    alpha, beta = [0.0] * (n + 1), [0.0] * (n + 1)
    for j in range(1, n + 1):
        alpha[j] = log_sum(
            [
                alpha[i] + log_probs[text[i:j]]
                for i in range(max(0, j - longest), j)
                if text[i:j] in log_probs
            ]
        )
    for i in range(n - 1, -1, -1):
        beta[i] = log_sum(
            [
                log_probs[text[i:j]] + beta[j]
                for j in range(i + 1, min(n, i + longest) + 1)
                if text[i:j] in log_probs
            ]
        )
    if alpha[n] == -math.inf:
        raise ValueError("no segmentation")
    counts = {}
    for i in range(n):
        for j in range(i + 1, min(n, i + longest) + 1):
            if text[i:j] in log_probs:
                counts[text[i:j]] = math.exp(alpha[i] + log_probs[text[i:j]] + beta[j] - alpha[n])
    return alpha[n], counts

# %% right="unigram_expected_counts" because="the gradient of log Z by autograd"
def unigram_expected_counts(text, log_probs):
    names = list(log_probs)
    place = {token: i for i, token in enumerate(names)}
    values = torch.tensor(
        [log_probs[token] for token in names], dtype=torch.float64, requires_grad=True
    )
    longest = max(map(len, names), default=0)
    single = values.unbind() if names else ()
    alpha = [torch.zeros((), dtype=torch.float64)]
    for j in range(1, len(text) + 1):
        terms = [
            alpha[i] + single[place[text[i:j]]]
            for i in range(max(0, j - longest), j)
            if text[i:j] in place and alpha[i] is not None
        ]
        alpha.append(torch.stack(terms).logsumexp(0) if terms else None)
    if alpha[-1] is None:
        raise ValueError("no segmentation")
    if not text:
        return 0.0, {}
    (counts,) = torch.autograd.grad(alpha[-1], values)
    return float(alpha[-1].detach()), dict(zip(names, counts.tolist()))

# %% wrong="key_questions" because="from left to right"
- return ["t", "here"]
+ return ["the", "re"]

# %% wrong="key_questions" because="stops after the first merge"
- return ["t", "here"]
+ return ["t", "he", "r", "e"]

# %% wrong="key_questions" because="bits per token"
- return math.log2(20) / 4.0, math.log2(15) / 3.0
+ return math.log2(20), math.log2(15)

# %% wrong="key_questions" because="nats"
- return math.log2(20) / 4.0, math.log2(15) / 3.0
+ return math.log(20) / 4, math.log(15) / 3

# %% wrong="key_questions" because="perplexity divided by the bytes"
- return math.log2(20) / 4.0, math.log2(15) / 3.0
+ return 20 / 4, 15 / 3

# %% wrong="key_questions" because="attention linear in the length"
- return 2500 / 1000, (2500 / 1000) ** 2
+ return 2.5, 2.5

# %% wrong="key_questions" because="upside down"
- return 2500 / 1000, (2500 / 1000) ** 2
+ return 0.4, 0.16

# %% wrong="key_questions" because="the bytes are forgotten"
- return 50_257 - 256 - 1
+ return 50_256

# %% wrong="key_questions" because="the special token is forgotten"
- return 50_257 - 256 - 1
+ return 50_001

# %% right="key_questions" because="replayed, per byte first, and numbers"
def question_order():
    symbols = list("there")
    for pair in [("h", "e"), ("t", "h"), ("th", "e"), ("r", "e"), ("he", "re")]:
        i = 0
        while i + 1 < len(symbols):
            if (symbols[i], symbols[i + 1]) == pair:
                symbols[i : i + 2] = ["".join(pair)]
            i += 1
    return symbols


def question_compare():
    return math.log2(20 ** (1 / 4)), math.log2(15 ** (1 / 3))


def question_premium():
    return 2.5, 6.25


def question_vocabulary():
    return 50_000

# %% right="encode_chat" because="two texts, one after the other"
def encode_chat(messages, tokenizer):
    roles = {"system", "user", "assistant"}
    start, end = tokenizer.special["<|start|>"], tokenizer.special["<|end|>"]
    ids = []
    for message in messages:
        if message["role"] not in roles:
            raise ValueError(message["role"])
        ids.append(start)
        for text in (message["role"] + "\n", message["content"]):
            ids.extend(encode(text, tokenizer, False))
        ids.append(end)
    return ids

# %% wrong="merge_pair" because="the id 0 is taken for no symbol"
def merge_pair(symbols: list, pair: tuple, merged) -> list:
    out, held = [], None
    for symbol in symbols:
        if held and (held, symbol) == pair:
            out.append(merged)
            held = None
        else:
            if held is not None:
                out.append(held)
            held = symbol
    if held is not None:
        out.append(held)
    return out

# %% wrong="merge_pair" because="compared with is, which holds for small numbers and single bytes only"
- if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
+ if i + 1 < len(symbols) and symbols[i] is pair[0] and symbols[i + 1] is pair[1]:

# %% wrong="merge_pair" because="hands back the given list where the pair does not occur"
- out, i = [], 0
+ if pair not in pairwise(symbols):
+     return symbols
+ out, i = [], 0

# %% wrong="wordpiece_tokenize" because="the longest word is measured in bytes"
- if len(word) > max_characters:
+ if len(word.encode()) > max_characters:

# %% wrong="wordpiece_tokenize" because="nothing is left of a word that is ##"
def wordpiece_tokenize(word, vocab, unknown="[UNK]", max_characters=100):
    if len(word) > max_characters:
        return [unknown]
    pieces, rest = [], word
    while rest not in ("", "##"):
        prefix = rest
        while prefix not in vocab and prefix not in ("", "##"):
            prefix = prefix[:-1]
        if prefix in ("", "##"):
            return [unknown]
        pieces.append(prefix)
        rest = "##" + rest[len(prefix) :]
    return pieces

# %% wrong="utf8_encode" because="str.encode, guarded by chr"
def utf8_encode(code_point: int) -> bytes:
    if 0xD800 <= code_point <= 0xDFFF:
        raise ValueError("a surrogate is no character")
    return chr(code_point).encode("utf-8")  # chr raises ValueError outside 0 to 0x10FFFF


# %% wrong="encode" because="with special False the text is still cut at special tokens"
- if special and tokenizer.special:
+ if tokenizer.special:

- if i % 2:
+ if i % 2 and special:

# %% wrong="encode" because="remembers finished pieces in an attribute of the tokenizer"
def encode(text: str, tokenizer: Tokenizer, special: bool = True) -> list[int]:
    if not hasattr(tokenizer, "cache"):
        tokenizer.cache = {}
    parts = [text]
    if special and tokenizer.special:
        longest_first = sorted(tokenizer.special, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    ids = []
    for k, part in enumerate(parts):
        if k % 2:
            ids.append(tokenizer.special[part])
            continue
        for piece in pre_tokenize(part):
            if piece not in tokenizer.cache:
                symbols = [bytes([byte]) for byte in piece.encode()]
                while len(symbols) > 1:
                    best = min(
                        pairwise(symbols), key=lambda pair: tokenizer.ranks.get(pair, math.inf)
                    )
                    if best not in tokenizer.ranks:
                        break
                    symbols = merge_pair(symbols, best, best[0] + best[1])
                tokenizer.cache[piece] = [tokenizer.ids[symbol] for symbol in symbols]
            ids.extend(tokenizer.cache[piece])
    return ids

# %% wrong="encode_chat" because="a role is looked for as a part of a string"
- if message["role"] not in ("system", "user", "assistant"):
+ if message["role"] not in "system user assistant":

# %% wrong="encode_chat" because="a special token that is called like the role and its line feed"
- text = encode(message["role"] + "\n", tokenizer, special=False) + encode(
+ text = encode(message["role"] + "\n", tokenizer, special=True) + encode(

# %% wrong="unigram_viterbi" because="a certain token is taken for one that is missing"
- candidate = score[i] + log_probs.get(text[i:j], -math.inf)
+ candidate = score[i] + (log_probs.get(text[i:j]) or -math.inf)

# %% wrong="unigram_expected_counts" because="no token of more than 16 characters"
- longest, n = max(map(len, log_probs), default=0), len(text)
+ longest, n = 16, len(text)
