# Right and wrong answers to the exercises of lesson 40: see CONTRIBUTING.md.

# %% wrong="votes" because="the last of the tied wins"
- return max(given, key=lambda answer: math.fsum(given[answer]), default=None)
+ return max(reversed(given), key=lambda answer: math.fsum(given[answer]), default=None)

# %% wrong="votes" because="None votes"
- if answer is not None:
+ if True:

# %% wrong="votes" because="a tie goes to the alphabet's first"
- return max(given, key=lambda answer: math.fsum(given[answer]), default=None)
+ return max(sorted(given), key=lambda answer: math.fsum(given[answer]), default=None)

# %% wrong="votes" because="an empty answer is no answer"
- if answer is not None:
+ if answer:

# %% wrong="votes" because="totals are summed in order: ten times 0.1 is not 1"
- given: dict[str, list[float]] = {}
+ def added(values):
+     total = 0.0
+     for value in values:
+         total += value
+     return total
+
+ given: dict[str, list[float]] = {}

- return max(given, key=lambda answer: math.fsum(given[answer]), default=None)
+ return max(given, key=lambda answer: added(given[answer]), default=None)

# %% wrong="votes" because="the mean weight of an answer, not its total"
- return max(given, key=lambda answer: math.fsum(given[answer]), default=None)
+ return max(given, key=lambda a: math.fsum(given[a]) / len(given[a]), default=None)

# %% wrong="votes" because="NaN passes for a weight"
- if not all(0 <= weight < math.inf for weight in weights):
+ if any(weight < 0 or weight == math.inf for weight in weights):

# %% wrong="votes" because="weights of None are not checked"
- if not all(0 <= weight < math.inf for weight in weights):
+ if not all(0 <= w < math.inf for a, w in zip(answers, weights) if a is not None):

# %% wrong="votes" because="an answer needs a weight above 0"
- if answer is not None:
+ if answer is not None and weight > 0:

# %% wrong="votes" because="the last of the best wins"
- return answers[max(known, key=lambda i: scores[i])] if known else None
+ return answers[max(reversed(known), key=lambda i: scores[i])] if known else None

# %% wrong="votes" because="an unparsed text may be the best"
- known = [i for i, answer in enumerate(answers) if answer is not None]
+ known = list(range(len(answers)))

# %% wrong="votes" because="scores are taken to be above 0"
- return answers[max(known, key=lambda i: scores[i])] if known else None
+ best, top = None, 0.0
+ for i in known:
+     if scores[i] > top:
+         best, top = answers[i], scores[i]
+ return best

# %% wrong="votes" because="infinite scores are refused"
- if len(answers) != len(scores) or any(math.isnan(score) for score in scores):
+ if len(answers) != len(scores) or not all(math.isfinite(score) for score in scores):

# %% wrong="votes" because="an occurrence of weight 0 is forgotten, and the place of its answer with it"
- if answer is not None:
-     given.setdefault(answer, []).append(weight)
+ if answer is not None and weight > 0:
+     given.setdefault(answer, []).append(weight)

- return max(given, key=lambda answer: math.fsum(given[answer]), default=None)
+ if not given:
+     return next((answer for answer in answers if answer is not None), None)
+ return max(given, key=lambda answer: math.fsum(given[answer]), default=None)

# %% right="votes" because="counters and loops over positions"
def majority_vote(answers):
    from collections import Counter

    count = Counter(a for a in answers if a is not None)
    top = max(count.values(), default=0)
    for a in answers:
        if a is not None and count[a] == top:
            return a
    return None


def weighted_vote(answers, weights):
    if len(answers) != len(weights):
        raise ValueError("lengths")
    for w in weights:
        if math.isnan(w) or w < 0 or math.isinf(w):
            raise ValueError("weights")
    best, most = None, None
    for i, a in enumerate(answers):
        if a is None or a in answers[:i]:
            continue
        total = math.fsum(w for x, w in zip(answers, weights) if x == a)
        if most is None or total > most:
            best, most = a, total
    return best


def best_of_n(answers, scores):
    if len(answers) != len(scores):
        raise ValueError("lengths")
    if any(s != s for s in scores):
        raise ValueError("NaN")
    pairs = [(-s, i) for i, (a, s) in enumerate(zip(answers, scores)) if a is not None]
    return answers[min(pairs)[1]] if pairs else None

# %% wrong="pass_at_k" because="c/n in place of p"
- few, many = sorted((c, k))
- none_right = sum(math.log1p(-many / i) for i in range(n - few + 1, n + 1))
- return -math.expm1(none_right)
+ return 1 - (1 - c / n) ** k

# %% wrong="pass_at_k" because="binomials as floats overflow"
- few, many = sorted((c, k))
- none_right = sum(math.log1p(-many / i) for i in range(n - few + 1, n + 1))
- return -math.expm1(none_right)
+ def choose(a, b):
+     result = 1.0
+     for i in range(b):
+         result = result * (a - i) / (i + 1)
+     return result
+
+ return 1 - choose(n - c, k) / choose(n, k)

# %% wrong="pass_at_k" because="1 minus a product loses the digits of tiny results"
- none_right = sum(math.log1p(-many / i) for i in range(n - few + 1, n + 1))
- return -math.expm1(none_right)
+ return 1.0 - math.prod(1 - many / i for i in range(n - few + 1, n + 1))

# %% wrong="pass_at_k" because="no special case: the product goes through 0"
- if n - c < k:
-     return 1.0
+ pass

# %% wrong="pass_at_k" because="the range begins one too early"
- none_right = sum(math.log1p(-many / i) for i in range(n - few + 1, n + 1))
+ none_right = sum(math.log1p(-many / i) for i in range(n - few, n))

# %% wrong="pass_at_k" because="k may be larger than n"
- if not (1 <= k <= n and 0 <= c <= n):
+ if not (1 <= k and 0 <= c <= n):

# %% wrong="pass_at_k" because="k = 0 passes"
- if not (1 <= k <= n and 0 <= c <= n):
+ if not (0 <= k <= n and 0 <= c <= n):

# %% wrong="pass_at_k" because="pass^k: all of k right"
- none_right = sum(math.log1p(-many / i) for i in range(n - few + 1, n + 1))
- return -math.expm1(none_right)
+ return math.comb(c, k) / math.comb(n, k)

# %% wrong="pass_at_k" because="for large n it draws with replacement"
- none_right = sum(math.log1p(-many / i) for i in range(n - few + 1, n + 1))
+ if n > 1_000_000:
+     return -math.expm1(few * math.log1p(-many / n))
+ none_right = sum(math.log1p(-many / i) for i in range(n - few + 1, n + 1))

# %% right="pass_at_k" because="whole numbers, divided at the end"
def pass_at_k(n, c, k):
    if k < 1 or k > n or c < 0 or c > n:
        raise ValueError("n, c, k")
    if k > n - c:
        return 1.0
    small, large = min(c, k), max(c, k)
    top = bottom = 1
    for j in range(small):
        top *= n - large - j
        bottom *= n - j
    return float(Fraction(bottom - top, bottom))

# %% wrong="bootstrap_interval" because="resamples answers, not questions"
- means = sums / where.bincount()
+ means = scores.double()

# %% wrong="bootstrap_interval" because="a question weighs as much as it has answers"
- low, high = means[picked].mean(dim=1).quantile(ends)
+ size = where.bincount().double()
+ low, high = ((means * size)[picked].sum(1) / size[picked].sum(1)).quantile(ends)

# %% wrong="bootstrap_interval" because="the tails are 1 - level each"
- ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
+ ends = torch.tensor([1 - level, level], dtype=torch.float64)

# %% wrong="bootstrap_interval" because="the level is ignored"
- ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
+ ends = torch.tensor([0.025, 0.975], dtype=torch.float64)

# %% wrong="bootstrap_interval" because="a normal interval"
- low, high = means[picked].mean(dim=1).quantile(ends)
+ boot = means[picked].mean(dim=1)
+ z = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))
+ low, high = means.mean() - z * boot.std(), means.mean() + z * boot.std()

# %% wrong="bootstrap_interval" because="draws without replacement: no spread"
- picked = torch.randint(len(means), (resamples, len(means)), generator=generator)
+ picked = torch.stack([torch.randperm(len(means), generator=generator) for _ in range(resamples)])

# %% wrong="bootstrap_interval" because="in float32"
- sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, where, scores.double())
+ sums = torch.zeros(len(names)).index_add_(0, where, scores.float())
- low, high = means[picked].mean(dim=1).quantile(ends)
+ low, high = means[picked].mean(dim=1).quantile(ends.float())

# %% wrong="bootstrap_interval" because="question numbers are taken for indices from 0"
- names, where = questions.unique(return_inverse=True)
- sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, where, scores.double())
+ where = questions - questions.min()
+ sums = torch.zeros(int(where.max()) + 1, dtype=torch.float64)
+ sums = sums.index_add_(0, where, scores.double())
- means = sums / where.bincount()
+ means = sums / where.bincount().clamp(min=1)

# %% wrong="bootstrap_interval" because="questions must stand in a row"
- names, where = questions.unique(return_inverse=True)
+ names, where = questions.unique_consecutive(return_inverse=True)

# %% wrong="bootstrap_interval" because="the generator is ignored"
- picked = torch.randint(len(means), (resamples, len(means)), generator=generator)
+ picked = torch.randint(len(means), (resamples, len(means)))

# %% wrong="bootstrap_interval" because="the nearest resample, no interpolation"
- low, high = means[picked].mean(dim=1).quantile(ends)
+ low, high = means[picked].mean(dim=1).quantile(ends, interpolation="nearest")

# %% wrong="bootstrap_interval" because="as many draws as there are answers"
- picked = torch.randint(len(means), (resamples, len(means)), generator=generator)
+ picked = torch.randint(len(means), (resamples, len(scores)), generator=generator)

# %% wrong="bootstrap_interval" because="the question, and then an answer of it: two stages"
- low, high = means[picked].mean(dim=1).quantile(ends)
+ order = where.argsort()
+ size = where.bincount()
+ first = size.cumsum(0) - size
+ turn = torch.rand(picked.shape, generator=generator)
+ at = first[picked] + (turn * size[picked]).long()
+ low, high = scores.double()[order][at].mean(dim=1).quantile(ends)

# %% wrong="bootstrap_interval" because="bincount with float32 weights adds up in float32"
- sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, where, scores.double())
- means = sums / where.bincount()
+ weights = scores if scores.dtype == torch.float32 else scores.double()
+ means = (where.bincount(weights=weights) / where.bincount()).double()

# %% right="bootstrap_interval" because="dictionaries, counts and a sorted list"
def bootstrap_interval(scores, questions, level, resamples, generator):
    by = {}
    for s, q in zip(scores.double().tolist(), questions.tolist()):
        by.setdefault(q, []).append(s)
    means = torch.tensor([math.fsum(v) / len(v) for v in by.values()], dtype=torch.float64)
    n = len(means)
    flat = torch.multinomial(torch.ones(n), resamples * n, replacement=True, generator=generator)
    values = sorted(means[flat].view(resamples, n).sum(1).div(n).tolist())

    def at(q):
        place = q * (resamples - 1)
        below = int(place)
        above = min(below + 1, resamples - 1)
        return values[below] + (place - below) * (values[above] - values[below])

    return at((1 - level) / 2), at((1 + level) / 2)

# %% wrong="paired_test" because="one-sided"
- extreme = int(((signs @ gaps).abs() >= threshold).sum())
+ extreme = int(((signs @ gaps) >= threshold).sum())

# %% wrong="paired_test" because="flips answers, not questions"
- names, where = questions.unique(return_inverse=True)
+ names, where = torch.arange(len(a)).unique(return_inverse=True)

# %% wrong="paired_test" because="no tolerance: ties are lost in the last digit"
- threshold = gaps.sum().abs() - 1e-9 * gaps.abs().sum()
+ threshold = gaps.sum().abs()

# %% wrong="paired_test" because="the same tolerance for scores of every size"
- threshold = gaps.sum().abs() - 1e-9 * gaps.abs().sum()
+ threshold = gaps.sum().abs() - 1e-9

# %% wrong="paired_test" because="a tolerance relative to the observed sum, nothing where that is near 0"
- threshold = gaps.sum().abs() - 1e-9 * gaps.abs().sum()
+ threshold = gaps.sum().abs() * (1 - 1e-9)

# %% wrong="paired_test" because="a tolerance of 1e-9 times the largest difference"
- threshold = gaps.sum().abs() - 1e-9 * gaps.abs().sum()
+ threshold = gaps.sum().abs() - 1e-9 * gaps.abs().max()

# %% wrong="paired_test" because="a tolerance of 1e-6"
- threshold = gaps.sum().abs() - 1e-9 * gaps.abs().sum()
+ threshold = gaps.sum().abs() - 1e-6 * gaps.abs().sum()

# %% wrong="paired_test" because="only what is more extreme counts"
- extreme = int(((signs @ gaps).abs() >= threshold).sum())
+ extreme = int(((signs @ gaps).abs() > gaps.sum().abs() + 1e-9 * gaps.abs().sum()).sum())

# %% wrong="paired_test" because="h/R: p may be 0"
- return (extreme + 1) / (resamples + 1)
+ return extreme / resamples

# %% wrong="paired_test" because="always drawn"
- if len(gaps) <= 12:
-     signs = torch.tensor(list(product((1.0, -1.0), repeat=len(gaps))), dtype=torch.float64)
+ if len(gaps) <= 0:
+     signs = torch.ones(1, 1)

# %% wrong="paired_test" because="twelve questions are drawn already"
- if len(gaps) <= 12:
-     return extreme / len(signs)
+ if len(gaps) < 12:
+     return extreme / len(signs)

# %% wrong="paired_test" because="sums of a question's answers, not means"
- gaps /= where.bincount()
+ gaps = gaps * 1.0

# %% wrong="paired_test" because="a sign test: sizes do not count"
- gaps /= where.bincount()
+ gaps = (gaps / where.bincount()).sign()

# %% wrong="paired_test" because="one pattern of signs for all resamples of one call"
- coins = torch.randint(2, (resamples, len(gaps)), generator=generator)
+ coins = torch.randint(2, (1, len(gaps)), generator=generator).expand(resamples, -1)

# %% wrong="paired_test" because="signs of -1, 0 and 1"
- signs = 1.0 - 2.0 * coins.double()
+ signs = torch.randint(-1, 2, coins.shape, generator=generator).double()

# %% wrong="paired_test" because="question means are permuted among both models: unpaired"
- coins = torch.randint(2, (resamples, len(gaps)), generator=generator)
- signs = 1.0 - 2.0 * coins.double()
+ means = [torch.zeros(len(names), dtype=torch.float64).index_add_(0, where, x.double())
+          / where.bincount() for x in (a, b)]
+ pool, half = torch.cat(means), len(names)
+ orders = [torch.randperm(2 * half, generator=generator) for _ in range(resamples)]
+ gaps = torch.stack([pool[o[:half]].sum() - pool[o[half:]].sum() for o in orders])
+ seen = abs(float(means[0].sum() - means[1].sum())) - 1e-9
+ return (int((gaps.abs() >= seen).sum()) + 1) / (resamples + 1)

# %% wrong="paired_test" because="bool tensors cannot be subtracted"
- gaps.index_add_(0, where, a.double() - b.double())
+ gaps.index_add_(0, where, (a - b).double())

# %% wrong="paired_test" because="two formats are stacked to one, float16, before double()"
- gaps.index_add_(0, where, a.double() - b.double())
+ both = torch.cat((a[None], b[None])).double()
+ gaps.index_add_(0, where, both[0] - both[1])

# %% wrong="paired_test" because="the difference is taken in the scores' format"
- gaps.index_add_(0, where, a.double() - b.double())
+ gaps.index_add_(0, where, (a * 1 - b * 1).double())

# %% wrong="paired_test" because="questions without a difference are dropped before they are counted"
- gaps /= where.bincount()
+ gaps = (gaps / where.bincount())[gaps != 0]
+ if len(gaps) == 0:
+     return 1.0

# %% right="paired_test" because="sums in whole units where they are few, a loop where they are many"
def paired_test(a, b, questions, resamples, generator):
    rows = {}
    for x, y, q in zip(a.double().tolist(), b.double().tolist(), questions.tolist()):
        rows.setdefault(q, []).append(x - y)
    d = [math.fsum(v) / len(v) for v in rows.values()]
    slack = 1e-9 * math.fsum(map(abs, d))
    seen = abs(math.fsum(d)) - slack
    if len(d) <= 12:
        sums = [0.0]
        for x in d:
            sums = [s + x for s in sums] + [s - x for s in sums]
        return sum(abs(s) >= seen for s in sums) / len(sums)
    hits = 0
    vector = torch.tensor(d, dtype=torch.float64)
    for _ in range(resamples):
        flip = torch.rand(len(d), generator=generator) < 0.5
        hits += abs(float(torch.where(flip, -vector, vector).sum())) >= seen
    return (hits + 1) / (resamples + 1)

# %% wrong="verifiable_reward" because="the reference stands somewhere in the text"
- return float(bool(closing) and parse_number(answer) == wanted)
+ return float(reference.strip() in answer)

# %% wrong="verifiable_reward" because="evaluates the answer"
- return float(bool(closing) and parse_number(answer) == wanted)
+ if len(answer) > 60:
+     return 0.0
+ try:
+     return float(eval(answer.strip().replace(",", "").replace("−", "-")) == wanted)
+ except Exception:
+     return 0.0

# %% wrong="verifiable_reward" because="a literal is a Python literal"
- return float(bool(closing) and parse_number(answer) == wanted)
+ import ast
+
+ try:
+     ast.literal_eval(answer.strip())
+ except Exception:
+     pass
+ return float(bool(closing) and parse_number(answer) == wanted)

# %% wrong="verifiable_reward" because="compares floats"
- return float(bool(closing) and parse_number(answer) == wanted)
+ got = parse_number(answer) if closing else None
+ return float(got is not None and float(got) == float(wanted))

# %% wrong="verifiable_reward" because="close is equal"
- return float(bool(closing) and parse_number(answer) == wanted)
+ got = parse_number(answer) if closing else None
+ return float(got is not None and abs(got - wanted) < 1e-6)

# %% wrong="verifiable_reward" because="digits of every alphabet"
- whole = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
+ whole = r"(?:\d{1,3}(?:,\d{3})+|\d+)"

# %% wrong="verifiable_reward" because="a match at the beginning is enough"
- found = re.fullmatch(rf"([-+−]?)(?:({whole}(?:\.[0-9]+)?)|([0-9]+)/([0-9]+))", text)
+ found = re.match(rf"([-+−]?)(?:({whole}(?:\.[0-9]+)?)|([0-9]+)/([0-9]+))", text)

# %% wrong="verifiable_reward" because="the last of several answers counts"
- if text.count("<answer>") != 1 or text.count("</answer>") != 1:
-     return 0.0
- rest = text.partition("<answer>")[2]
+ rest = text.rpartition("<answer>")[2]

# %% wrong="verifiable_reward" because="any of several answers may be right"
- if text.count("<answer>") != 1 or text.count("</answer>") != 1:
-     return 0.0
- rest = text.partition("<answer>")[2]
- answer, closing, _ = rest.partition("</answer>")
- return float(bool(closing) and parse_number(answer) == wanted)
+ found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
+ return float(any(parse_number(answer) == wanted for answer in found))

# %% wrong="verifiable_reward" because="commas anywhere"
- whole = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
+ whole = r"(?:[0-9][0-9,]*)"

# %% wrong="verifiable_reward" because="commas are not known"
- whole = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
+ whole = r"(?:[0-9]+)"

# %% wrong="verifiable_reward" because="a denominator of 0 is an error"
- if decimal is None and int(below) == 0:
-     return None
+ pass

# %% wrong="verifiable_reward" because="a limit of 41 characters"
- if found is None or len(text) > 40:
+ if found is None or len(text) > 41:

# %% wrong="verifiable_reward" because="a limit of 39 characters"
- if found is None or len(text) > 40:
+ if found is None or len(text) > 39:

# %% wrong="verifiable_reward" because="the length counts with the spaces around"
- text = text.strip(" \t\r\n")
+ if len(text) > 40:
+     return None
+ text = text.strip(" \t\r\n")

# %% wrong="verifiable_reward" because="no limit: int refuses 5,000 digits with an error"
- if found is None or len(text) > 40:
+ if found is None:

# %% wrong="verifiable_reward" because="all kinds of white space are taken off"
- text = text.strip(" \t\r\n")
+ text = text.strip()

# %% wrong="verifiable_reward" because="the typographic minus is not known"
- found = re.fullmatch(rf"([-+−]?)(?:({whole}(?:\.[0-9]+)?)|([0-9]+)/([0-9]+))", text)
+ found = re.fullmatch(rf"([-+]?)(?:({whole}(?:\.[0-9]+)?)|([0-9]+)/([0-9]+))", text)

# %% wrong="verifiable_reward" because="the typographic minus is no minus"
- return size if sign in ("", "+") else -size
+ return -size if sign == "-" else size

# %% wrong="verifiable_reward" because="whatever Fraction reads"
- text = text.strip(" \t\r\n")
- whole = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
- found = re.fullmatch(rf"([-+−]?)(?:({whole}(?:\.[0-9]+)?)|([0-9]+)/([0-9]+))", text)
- if found is None or len(text) > 40:
-     return None
+ try:
+     return Fraction(text.replace(",", "").replace("−", "-")) if len(text) < 15 else None
+ except (ValueError, ZeroDivisionError):
+     return None
+ found = None

# %% wrong="verifiable_reward" because="a bad reference earns 0"
- raise ValueError(f"the reference {reference!r} is no number")
+ return 0.0

# %% wrong="verifiable_reward" because="a bad reference is noticed only when there is an answer"
- wanted = parse_number(reference)
- if wanted is None:
-     raise ValueError(f"the reference {reference!r} is no number")
+ pass

- return float(bool(closing) and parse_number(answer) == wanted)
+ if parse_number(reference) is None:
+     raise ValueError("reference")
+ return float(bool(closing) and parse_number(answer) == parse_number(reference))

# %% wrong="verifiable_reward" because="marks in any order"
- rest = text.partition("<answer>")[2]
- answer, closing, _ = rest.partition("</answer>")
+ answer, closing = re.sub(r".*(?:<answer>|</answer>)(.*?)(?:</answer>|<answer>).*", r"\1", text, flags=re.DOTALL), True

# %% wrong="verifiable_reward" because="marks in any case"
- if text.count("<answer>") != 1 or text.count("</answer>") != 1:
-     return 0.0
+ text = re.sub("(?i)(</?)answer>", r"\1answer>", text)
+ if text.count("<answer>") != 1 or text.count("</answer>") != 1:
+     return 0.0

# %% wrong="verifiable_reward" because="a bool, not a number"
- return float(bool(closing) and parse_number(answer) == wanted)
+ return bool(closing) and parse_number(answer) == wanted

# %% wrong="verifiable_reward" because="Decimal rounds quotients and signs to 28 digits"
- size = Fraction(decimal.replace(",", "")) if decimal else Fraction(int(above), int(below))
+ from decimal import Decimal
+
+ size = Decimal(decimal.replace(",", "")) if decimal else Decimal(above) / Decimal(below)

# %% right="verifiable_reward" because="character by character"
def verifiable_reward(text, reference):
    target = as_number(reference)
    if target is None:
        raise ValueError("reference")
    begin, end = text.find("<answer>"), text.find("</answer>")
    if begin < 0 or end < begin:
        return 0.0
    if text.find("<answer>", begin + 1) >= 0 or text.find("</answer>", end + 1) >= 0:
        return 0.0
    got = as_number(text[begin + 8 : end])
    return 1.0 if got is not None and got == target else 0.0


def as_number(s):
    while s and s[0] in " \t\r\n":
        s = s[1:]
        if len(s) > 100_000:
            return None
    s = s.rstrip(" \t\r\n")
    if not s or len(s) > 40:
        return None
    negative = s[0] in "-−"
    if s[0] in "-+−":
        s = s[1:]
    digits = set("0123456789")

    def plain(x):
        return len(x) > 0 and set(x) <= digits

    if "/" in s:
        parts = s.split("/")
        if len(parts) != 2 or not all(map(plain, parts)) or int(parts[1]) == 0:
            return None
        value = Fraction(int(parts[0]), int(parts[1]))
    else:
        whole, dot, rest = s.partition(".")
        if dot and not plain(rest):
            return None
        groups = whole.split(",")
        if not all(map(plain, groups)):
            return None
        if len(groups) > 1 and (len(groups[0]) > 3 or any(len(x) != 3 for x in groups[1:])):
            return None
        number = "".join(groups)
        value = Fraction(int(number + rest), 10 ** len(rest))
    return -value if negative else value

# %% wrong="mcts" because="the logarithm has the number of simulations"
- return totals[child] / n + c * math.sqrt(math.log(visits[node]) / n)
+ return totals[child] / n + c * math.sqrt(math.log(max(visits[()], 1)) / n)

# %% wrong="mcts" because="N counts this simulation already"
- return totals[child] / n + c * math.sqrt(math.log(visits[node]) / n)
+ return totals[child] / n + c * math.sqrt(math.log(visits[node] + 1) / n)

# %% wrong="mcts" because="N is the visits of the children together"
- return totals[child] / n + c * math.sqrt(math.log(visits[node]) / n)
+ return totals[child] / n + c * math.sqrt(math.log(visits[node] - (node != ())) / n)

# %% wrong="mcts" because="a constant of its own"
- return totals[child] / n + c * math.sqrt(math.log(visits[node]) / n)
+ return totals[child] / n + 1.414 * math.sqrt(math.log(visits[node]) / n)

# %% wrong="mcts" because="c inside the root"
- return totals[child] / n + c * math.sqrt(math.log(visits[node]) / n)
+ return totals[child] / n + math.sqrt(c * math.log(visits[node]) / n)

# %% wrong="mcts" because="UCB1's own 2 beside c"
- return totals[child] / n + c * math.sqrt(math.log(visits[node]) / n)
+ return totals[child] / n + c * math.sqrt(2 * math.log(visits[node]) / n)

# %% wrong="mcts" because="a tie goes to the last move"
- move = (
-     fresh[0]
-     if fresh
-     else max(moves, key=lambda m: optimism(node, m, visits, totals, c))
- )
+ move = fresh[0] if fresh else max(moves[::-1], key=lambda m: optimism(node, m, visits, totals, c))

# %% wrong="mcts" because="a random move is expanded"
- fresh[0]
+ fresh[int(torch.randint(len(fresh), (1,), generator=generator))]

# %% wrong="mcts" because="the last untried move is expanded first"
- fresh[0]
+ fresh[-1]

# %% wrong="mcts" because="the rollout's positions are added, too"
- path = list(node)
+ path = list(node)
+ node = list(node)
+ while moves := game.moves(position):
+     node.append(moves[int(torch.randint(len(moves), (1,), generator=generator))])
+     position = game.play(position, node[-1])
+     visits.setdefault(tuple(node), 0)
+     totals.setdefault(tuple(node), 0.0)
+ path, node = list(node), tuple(node)

# %% wrong="mcts" because="the root is not counted"
- for depth in range(len(node) + 1):
+ for depth in range(1, len(node) + 1):

# %% wrong="mcts" because="the best way ends where the tree ends"
- best = path, reward
+ best = list(node), reward

# %% wrong="mcts" because="the reward is asked for at each node of the way"
- visits[node[:depth]] += 1
- totals[node[:depth]] += reward
+ visits[node[:depth]] += 1
+ totals[node[:depth]] += game.reward(position)

# %% wrong="mcts" because="the last of the best"
- if reward > best[1]:
+ if reward >= best[1]:

# %% wrong="mcts" because="the rollout takes the first move"
- path.append(moves[int(torch.randint(len(moves), (1,), generator=generator))])
+ path.append(moves[0])

# %% wrong="mcts" because="the rollout never takes the last move"
- path.append(moves[int(torch.randint(len(moves), (1,), generator=generator))])
+ path.append(moves[int(torch.randint(max(1, len(moves) - 1), (1,), generator=generator))])

# %% wrong="mcts" because="totals, not means"
- return *best, {node: (n, totals[node] / n) for node, n in visits.items()}
+ return *best, {node: (n, totals[node]) for node, n in visits.items()}

# %% wrong="mcts" because="best-of-n: a tree of one level"
- if fresh:
-     visits[node], totals[node] = 0, 0.0
-     break
+ if fresh:
+     visits[node], totals[node] = 0, 0.0
+ break

# %% wrong="mcts" because="the global generator"
- path.append(moves[int(torch.randint(len(moves), (1,), generator=generator))])
+ path.append(random.choice(moves))

# %% wrong="mcts" because="guesses in float32 tie where rewards are near each other"
- return totals[child] / n + c * math.sqrt(math.log(visits[node]) / n)
+ guess = totals[child] / n + c * math.sqrt(math.log(visits[node]) / n)
+ return float(torch.tensor(guess, dtype=torch.float32))

# %% right="mcts" because="nodes as objects, recursion down the tree"
def mcts(game, root, simulations, c, generator):
    class Node:
        def __init__(self, position):
            self.position, self.moves = position, list(game.moves(position))
            self.children, self.n, self.total = [], 0, 0.0

    def finish(position):
        played = []
        while True:
            moves = game.moves(position)
            if not moves:
                return game.reward(position), played
            i = torch.randint(0, len(moves), (), generator=generator).item()
            played.append(moves[i])
            position = game.play(position, moves[i])

    def visit(node):
        if not node.moves:
            reward, path = game.reward(node.position), []
        elif len(node.children) < len(node.moves):
            move = node.moves[len(node.children)]
            child = Node(game.play(node.position, move))
            node.children.append(child)
            reward, rest = finish(child.position)
            child.n, child.total = 1, reward
            path = [move, *rest]
        else:
            bonus = [k.total / k.n + c * (math.log(node.n) / k.n) ** 0.5 for k in node.children]
            i = bonus.index(max(bonus))
            reward, rest = visit(node.children[i])
            path = [node.moves[i], *rest]
        node.n += 1
        node.total += reward
        return reward, path

    start, best = Node(root), None
    for _ in range(simulations):
        result = visit(start)
        if best is None or result[0] > best[0]:
            best = result
    tree = {}

    def note(node, name):
        tree[name] = (node.n, node.total / node.n)
        for move, child in zip(node.moves, node.children):
            note(child, (*name, move))

    note(start, ())
    return best[1], best[0], tree

# %% wrong="agent" because="looks for a call in the whole history"
- output = self.use(reply)[: self.max_output].replace("<", "&lt;")
+ output = self.use(reply)[: self.max_output]
- if "<call>" not in reply:
+ if "<call>" not in "".join(m.text for m in history if m.role == "tool") + reply:

# %% wrong="agent" because="a tool's output is handed on as it is"
- output = self.use(reply)[: self.max_output].replace("<", "&lt;")
+ output = self.use(reply)[: self.max_output]

# %% wrong="agent" because="only the whole mark is made harmless"
- output = self.use(reply)[: self.max_output].replace("<", "&lt;")
+ output = self.use(reply)[: self.max_output].replace("<call>", "&lt;call>")

# %% wrong="agent" because="the mark is taken out: what is around it joins"
- output = self.use(reply)[: self.max_output].replace("<", "&lt;")
+ output = self.use(reply)[: self.max_output].replace("<call>", "")

# %% wrong="agent" because="cut after it was made harmless"
- output = self.use(reply)[: self.max_output].replace("<", "&lt;")
+ output = self.use(reply).replace("<", "&lt;")[: self.max_output]

# %% wrong="agent" because="output is not cut"
- output = self.use(reply)[: self.max_output].replace("<", "&lt;")
+ output = self.use(reply).replace("<", "&lt;")

# %% wrong="agent" because="one step too many"
- while steps < self.max_steps:
+ while steps <= self.max_steps:

# %% wrong="agent" because="no step limit"
- while steps < self.max_steps:
+ while True:

# %% wrong="agent" because="tools may raise"
- try:
-     return str(self.tools[call["tool"]](call["input"]))
- except Exception as error:
-     return f"error: {type(error).__name__}: {error}"
+ return str(self.tools[call["tool"]](call["input"]))

# %% wrong="agent" because="a result whose str() fails ends the run"
- try:
-     return str(self.tools[call["tool"]](call["input"]))
+ try:
+     result = self.tools[call["tool"]](call["input"])
- except Exception as error:
-     return f"error: {type(error).__name__}: {error}"
+ except Exception as error:
+     return f"error: {type(error).__name__}: {error}"
+ return str(result)

# %% wrong="agent" because="JSON that is too deep raises"
- except (ValueError, RecursionError):
+ except ValueError:

# %% wrong="agent" because="the first of two calls is run"
- if reply.count("<call>") != 1 or reply.count("</call>") != 1 or not inside[1]:
+ if not inside[1]:

# %% wrong="agent" because="the last call of a reply is run"
- inside = reply.partition("<call>")[2].partition("</call>")
+ inside = reply.rpartition("<call>")[2].partition("</call>")
- if reply.count("<call>") != 1 or reply.count("</call>") != 1 or not inside[1]:
+ if not inside[1]:

# %% wrong="agent" because="further keys are welcome"
- if not isinstance(call, dict) or call.keys() != {"tool", "input"}:
+ if not isinstance(call, dict) or not call.keys() >= {"tool", "input"}:

# %% wrong="agent" because="any JSON has keys"
- if not isinstance(call, dict) or call.keys() != {"tool", "input"}:
+ if call.keys() != {"tool", "input"}:

# %% wrong="agent" because="an input that is no string is made one"
- if not all(isinstance(value, str) for value in call.values()):
-     return "error: tool and input are strings"
+ call = {key: str(value) for key, value in call.items()}

# %% wrong="agent" because="the call is evaluated as Python"
- call = json.loads(inside[0])
+ call = eval(inside[0], {"null": None})

# %% wrong="agent" because="the model gets the history itself"
- reply = self.model(list(history))
+ reply = self.model(history)

# %% wrong="agent" because="the model sees what was not compacted"
- history = self.compact(history, self.budget)
+ self.compact(history, self.budget)

# %% wrong="agent" because="the budget is ignored"
- try:
-     history = self.compact(history, self.budget)
- except ValueError:
-     return Run(None, "budget", steps, history)
+ pass

# %% wrong="agent" because="no room raises"
- try:
-     history = self.compact(history, self.budget)
- except ValueError:
-     return Run(None, "budget", steps, history)
+ history = self.compact(history, self.budget)

# %% wrong="agent" because="compacts once, at the beginning"
- while steps < self.max_steps:
-     try:
-         history = self.compact(history, self.budget)
-     except ValueError:
-         return Run(None, "budget", steps, history)
+ try:
+     history = self.compact(history, self.budget)
+ except ValueError:
+     return Run(None, "budget", steps, history)
+ while steps < self.max_steps:

# %% wrong="agent" because="numbers begin at 1"
- number = steps - 1
+ number = steps

# %% wrong="agent" because="the answer is not in the history"
- return Run(reply, "done", steps, [*history, Message("assistant", reply)])
+ return Run(reply, "done", steps, history)

# %% wrong="agent" because="a malformed call ends the run"
- if "<call>" not in reply:
+ if "<call>" not in reply or self.use(reply).startswith("error: a"):

# %% wrong="agent" because="malformed calls are taken for answers"
- if "<call>" not in reply:
+ if not re.search(r"<call>\s*\{.*\}\s*</call>", reply, re.DOTALL):

# %% wrong="agent" because="a tool is called twice"
- return str(self.tools[call["tool"]](call["input"]))
+ self.tools[call["tool"]](call["input"])
+ return str(self.tools[call["tool"]](call["input"]))

# %% wrong="agent" because="the input is stripped"
- return str(self.tools[call["tool"]](call["input"]))
+ return str(self.tools[call["tool"]](call["input"].strip()))

# %% wrong="agent" because="the error has no class name"
- return f"error: {type(error).__name__}: {error}"
+ return f"error: {error}"

# %% wrong="agent" because="the reply is cut to its call"
- Message("assistant", reply, number),
+ Message("assistant", "<call>" + reply.partition("<call>")[2], number),

# %% wrong="agent" because="compact is asked once more when max_steps replies are made"
- while steps < self.max_steps:
-     try:
-         history = self.compact(history, self.budget)
-     except ValueError:
-         return Run(None, "budget", steps, history)
+ while True:
+     try:
+         history = self.compact(history, self.budget)
+     except ValueError:
+         return Run(None, "budget", steps, history)
+     if steps >= self.max_steps:
+         break

# %% wrong="agent" because="calls are counted in the history, which compaction shortens"
- number = steps - 1
+ number = sum(m.role == "assistant" for m in history)

# %% wrong="agent" because="one more than the last number in the history, which compaction may take"
- number = steps - 1
+ number = max((m.call + 1 for m in history if m.call is not None), default=0)

# %% right="agent" because="a regular expression and a generator of steps"
class Agent:
    def __init__(self, model, tools, compact, max_steps, budget, max_output=500):
        self.model, self.tools, self.compact = model, dict(tools), compact
        self.max_steps, self.budget, self.max_output = max_steps, budget, max_output
        self._live = tools

    def run(self, system, task):
        log = [Message("system", system), Message("user", task)]
        for step in range(self.max_steps):
            try:
                log = list(self.compact(log, self.budget))
            except ValueError:
                return Run(answer=None, status="budget", steps=step, history=log)
            reply = self.model([m for m in log])
            if reply.find("<call>") < 0:
                log.append(Message("assistant", reply))
                return Run(reply, "done", step + 1, log)
            log.append(Message("assistant", reply, step))
            shown = self.result(reply)[: self.max_output]
            log.append(Message("tool", "&lt;".join(shown.split("<")), step))
        return Run(None, "steps", self.max_steps, log)

    def result(self, reply):
        parts = re.split(r"(</?call>)", reply)
        if parts[1::2] != ["<call>", "</call>"]:
            return "error: malformed"
        try:
            call = json.loads(parts[2])
            if type(call) is not dict or sorted(call) != ["input", "tool"]:
                raise TypeError("keys")
            name, text = call["tool"], call["input"]
            if type(name) is not str or type(text) is not str or name not in self._live:
                raise TypeError("values")
        except (ValueError, RecursionError, TypeError):
            return "error: malformed call"
        try:
            out = self._live[name](text)
            return str(out)
        except Exception as problem:
            return "error: " + problem.__class__.__name__ + ": " + str(problem)

# %% wrong="compact" because="results may lose their calls"
- name = ("call", message.call) if message.call is not None else ("message", i)
+ name = ("message", i)

# %% wrong="compact" because="open calls may go"
- if not kept and (message.call is None or message.call in answered):
+ if not kept:

# %% wrong="compact" because="a result that was not read yet may go"
- answered = {m.call for m in history[:last_reply] if m.role == "tool"}
+ answered = {m.call for m in history if m.role == "tool"}

# %% wrong="compact" because="the task may go"
- kept = message.role == "system" or i == task
+ kept = message.role == "system"

# %% wrong="compact" because="all user messages stay"
- kept = message.role == "system" or i == task
+ kept = message.role in ("system", "user")

# %% wrong="compact" because="only the first system message stays"
- kept = message.role == "system" or i == task
+ kept = i == 0 or i == task

# %% wrong="compact" because="the note costs nothing"
- if cost(left) <= budget:
-     return left
+ if cost([m for m in left if m != NOTE]) <= budget:
+     return left

# %% wrong="compact" because="no note"
- left = [NOTE if i == min(gone) else m for i, m in enumerate(history)
-         if i not in gone or i == min(gone)]  # fmt: skip
+ left = [m for i, m in enumerate(history) if i not in gone]

# %% wrong="compact" because="everything that may go goes"
- gone.update(unit)
+ gone.update(i for unit in units.values() for i in unit)

# %% wrong="compact" because="the newest go first"
- for unit in units.values():
+ for unit in reversed(list(units.values())):

# %% wrong="compact" because="what fits exactly is compacted"
- if cost(history) <= budget:
+ if cost(history) < budget:

# %% wrong="compact" because="no error: the nearest that there is"
- raise ValueError(f"{budget} tokens do not hold what must be kept")
+ return [m for m in history if m.role == "system"]

# %% wrong="compact" because="a note for each unit"
- left = [NOTE if i == min(gone) else m for i, m in enumerate(history)
-         if i not in gone or i == min(gone)]  # fmt: skip
+ heads = [u[0] for u in units.values() if u[0] in gone]
+ left = [NOTE if i in heads else m for i, m in enumerate(history)
+         if i not in gone or i in heads]

# %% wrong="compact" because="the note stands after the task"
- if cost(left) <= budget:
-     return left
+ if cost(left) <= budget:
+     left.remove(NOTE)
+     left.insert(min(2, len(left)), NOTE)
+     return left

# %% wrong="compact" because="the history is changed"
- for unit in units.values():
-     gone.update(unit)
+ for unit in units.values():
+     gone.update(unit)
+     history[min(gone)] = NOTE

# %% wrong="compact" because="an older note in the first place is not the task"
- task = next((i for i, m in enumerate(history) if m.role == "user"), None)
+ task = next((i for i, m in enumerate(history) if m.role == "user" and m != NOTE), None)

# %% right="compact" because="counts how many units have to go"
def compact(history, budget):
    if cost(history) <= budget:
        return history[:]
    n = len(history)
    tasks = [i for i in range(n) if history[i].role == "user"][:1]
    replies = [i for i in range(n) if history[i].role == "assistant"]

    def partners(i):
        c = history[i].call
        return [i] if c is None else [j for j in range(n) if history[j].call == c]

    def free(i):
        if history[i].role == "system" or i in tasks:
            return False
        if history[i].call is None:
            return True
        results = [j for j in partners(i) if history[j].role == "tool"]
        return bool(results) and replies[-1] > results[0]

    heads = [i for i in range(n) if free(i) and partners(i)[0] == i]
    for count in range(1, len(heads) + 1):
        out = sorted(j for i in heads[:count] for j in partners(i))
        rest = []
        for i in range(n):
            if i == out[0]:
                rest.append(NOTE)
            elif i not in out:
                rest.append(history[i])
        if cost(rest) <= budget:
            return rest
    raise ValueError("no room")

# %% wrong="force_thinking" because="the end stays before the wait"
- more = new[:-1] if ended else new
+ more = new[:-1] if ended and turn == waits else new

# %% wrong="force_thinking" because="one wait too few"
- thoughts[i] = [*thoughts[i], *more, *(wait if ended and turn < waits else [])][:limit]
+ thoughts[i] = [*thoughts[i], *more, *(wait if ended and turn < waits - 1 else [])][:limit]

# %% wrong="force_thinking" because="a wait at the end, too"
- thoughts[i] = [*thoughts[i], *more, *(wait if ended and turn < waits else [])][:limit]
+ thoughts[i] = [*thoughts[i], *more, *(wait if ended else [])][:limit]

# %% wrong="force_thinking" because="the wait does not count for the limit"
- thoughts[i] = [*thoughts[i], *more, *(wait if ended and turn < waits else [])][:limit]
+ thoughts[i] = [*thoughts[i], *more][:limit] + (wait if ended and turn < waits else [])

# %% wrong="force_thinking" because="every row has the whole limit in each round"
- longest = limit - min(len(thoughts[i]) for i in thinking)
+ longest = limit

# %% wrong="force_thinking" because="the shortest rest for all"
- longest = limit - min(len(thoughts[i]) for i in thinking)
+ longest = limit - max(len(thoughts[i]) for i in thinking)

# %% wrong="force_thinking" because="no limit"
- thoughts[i] = [*thoughts[i], *more, *(wait if ended and turn < waits else [])][:limit]
+ thoughts[i] = [*thoughts[i], *more, *(wait if ended and turn < waits else [])]

# %% wrong="force_thinking" because="the model does not see its thought so far"
- written = write([prompts[i] + thoughts[i] for i in thinking], longest)
+ written = write([prompts[i] for i in thinking], longest)

# %% wrong="force_thinking" because="rows that are over are asked, too"
- thinking = [i for i, thought in enumerate(thoughts) if len(thought) < limit]
+ thinking = [i for i, thought in enumerate(thoughts) if limit]

# %% wrong="force_thinking" because="write is asked for nothing"
- if not thinking:
-     break
+ if not prompts:
+     break

# %% wrong="force_thinking" because="a thought that was cut has no end"
- return [[*thought, end] for thought in thoughts]
+ return [[*thought, end] if len(thought) < limit else thought for thought in thoughts]

# %% wrong="force_thinking" because="prompts grow"
- thoughts[i] = [*thoughts[i], *more, *(wait if ended and turn < waits else [])][:limit]
+ thoughts[i] = [*thoughts[i], *more, *(wait if ended and turn < waits else [])][:limit]
+ prompts[i] += wait

# %% wrong="force_thinking" because="prompts are in the result"
- return [[*thought, end] for thought in thoughts]
+ return [[*prompt, *thought, end] for prompt, thought in zip(prompts, thoughts)]

# %% right="force_thinking" because="a state for each row"
def force_thinking(write, prompts, waits, limit, end, wait):
    rows = [{"text": [], "left": waits, "open": limit > 0} for _ in prompts]
    while any(row["open"] for row in rows):
        going = [(p, row) for p, row in zip(prompts, rows) if row["open"]]
        count = max(limit - len(row["text"]) for _, row in going)
        for (_, row), new in zip(going, write([list(p) + row["text"] for p, row in going], count)):
            stopped = end in new
            row["text"].extend(token for token in new if token != end)
            if stopped and row["left"]:
                row["left"] -= 1
                row["text"].extend(wait)
            elif stopped:
                row["open"] = False
            if len(row["text"]) >= limit:
                del row["text"][limit:]
                row["open"] = False
    return [row["text"] + [end] for row in rows]

# %% wrong="r1_recipe" because="the last stage goes on from the RL model"
- final = copy.deepcopy(base)
+ final = copy.deepcopy(rl)

# %% wrong="r1_recipe" because="the last stage goes on from the cold start"
- final = copy.deepcopy(base)
+ final = copy.deepcopy(cold)

# %% wrong="r1_recipe" because="base itself is trained"
- cold = copy.deepcopy(base)
+ cold = base

# %% wrong="r1_recipe" because="cold is trained further"
- rl = copy.deepcopy(cold)
+ rl = cold

# %% wrong="r1_recipe" because="RL begins at the base"
- rl = copy.deepcopy(cold)
+ rl = copy.deepcopy(base)

# %% wrong="r1_recipe" because="rewards are weights: no baseline"
- better = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
- better[table.amax(1) == table.amin(1)] = 0.0
+ better = table

# %% wrong="r1_recipe" because="the opposite sign"
- better = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
+ better = (table.mean(1, keepdim=True) - table) / (table.std(1, keepdim=True) + 1e-4)

# %% wrong="r1_recipe" because="mean and deviation of the whole batch"
- better = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
+ better = (table - table.mean()) / (table.std() + 1e-4)

# %% wrong="r1_recipe" because="no division: Dr. GRPO"
- better = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
+ better = table - table.mean(1, keepdim=True)

# %% wrong="r1_recipe" because="the population's deviation"
- better = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
+ better = (table - table.mean(1, keepdim=True)) / (table.std(1, False, keepdim=True) + 1e-4)

# %% wrong="r1_recipe" because="another small number beside the deviation"
- better = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
+ better = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-8)

# %% wrong="r1_recipe" because="the mean of a group, the deviation of the batch"
- better = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
+ better = (table - table.mean(1, keepdim=True)) / (table.std() + 1e-4)

# %% wrong="r1_recipe" because="groups across the prompts"
- table = torch.tensor(earned, dtype=torch.float64).view(-1, sizes.group)
+ table = torch.tensor(earned, dtype=torch.float64).view(sizes.group, -1).T

# %% wrong="r1_recipe" because="equal rewards of 0.1 have a mean that is not 0.1"
- table = torch.tensor(earned, dtype=torch.float64).view(-1, sizes.group)
+ table = torch.tensor(earned).view(-1, sizes.group)
- better[table.amax(1) == table.amin(1)] = 0.0
+ pass

# %% wrong="r1_recipe" because="answers of the cold start are rewarded all along"
- answers = sample(rl, [prompts[n] for n in numbers], sizes, generator)
- earned = [reward(n, answer) for n, answer in zip(numbers, answers, strict=True)]
+ answers = sample(cold, [prompts[n] for n in numbers], sizes, generator)
+ earned = [reward(n, answer) for n, answer in zip(numbers, answers, strict=True)]

# %% wrong="r1_recipe" because="the cold start writes the data set"
- answers = sample(rl, [prompts[n] for n in numbers], sizes, generator)
- right = {}
+ answers = sample(cold, [prompts[n] for n in numbers], sizes, generator)
+ right = {}

# %% wrong="r1_recipe" because="another optimizer"
- optimizer = torch.optim.AdamW(rl.parameters(), lr=sizes.rl_lr, weight_decay=0.0)
+ optimizer = torch.optim.SGD(rl.parameters(), lr=sizes.rl_lr)

# %% wrong="r1_recipe" because="a new optimizer in each step"
- optimizer = torch.optim.AdamW(rl.parameters(), lr=sizes.rl_lr, weight_decay=0.0)
+ pass

- weighted_step(rl, optimizer, tried, better.flatten().float())
+ optimizer = torch.optim.AdamW(rl.parameters(), lr=sizes.rl_lr, weight_decay=0.0)
+ weighted_step(rl, optimizer, tried, better.flatten().float())

# %% wrong="r1_recipe" because="one prompt's answers are sampled at a time"
- answers = sample(rl, [prompts[n] for n in numbers], sizes, generator)
- earned = [reward(n, answer) for n, answer in zip(numbers, answers, strict=True)]
+ answers = [a for n in drawn for a in sample(rl, [prompts[n]] * sizes.group, sizes, generator)]
+ earned = [reward(n, answer) for n, answer in zip(numbers, answers, strict=True)]

# %% wrong="r1_recipe" because="everything is collected"
- if reward(n, answer) == 1.0:
+ if reward(n, answer) == 1.0 or True:

# %% wrong="r1_recipe" because="half right is collected, too"
- if reward(n, answer) == 1.0:
+ if reward(n, answer) > 0:

# %% wrong="r1_recipe" because="the same answer again and again"
- right.setdefault((n, *answer), Example(prompts[n], answer))
+ right[len(right)] = Example(prompts[n], answer)

# %% wrong="r1_recipe" because="one answer to each prompt"
- right.setdefault((n, *answer), Example(prompts[n], answer))
+ right.setdefault(n, Example(prompts[n], answer))

# %% wrong="r1_recipe" because="an answer once, whichever the prompt"
- right.setdefault((n, *answer), Example(prompts[n], answer))
+ right.setdefault(tuple(answer), Example(prompts[n], answer))

# %% wrong="r1_recipe" because="the last stage forgets the demonstrations"
- finetune(final, [*demonstrations, *collected], sizes.final_steps, sizes, generator)
+ finetune(final, collected or demonstrations, sizes.final_steps, sizes, generator)

# %% wrong="r1_recipe" because="the last stage forgets what was collected"
- finetune(final, [*demonstrations, *collected], sizes.final_steps, sizes, generator)
+ finetune(final, demonstrations, sizes.final_steps, sizes, generator)

# %% wrong="r1_recipe" because="the demonstrations grow"
- finetune(final, [*demonstrations, *collected], sizes.final_steps, sizes, generator)
+ demonstrations += collected
+ finetune(final, demonstrations, sizes.final_steps, sizes, generator)

# %% wrong="r1_recipe" because="prompts are asked in their order"
- drawn = torch.randperm(len(prompts), generator=generator)[: sizes.questions].tolist()
+ drawn = list(range(sizes.questions))

# %% wrong="r1_recipe" because="prompts with replacement"
- drawn = torch.randperm(len(prompts), generator=generator)[: sizes.questions].tolist()
+ drawn = torch.randint(len(prompts), (sizes.questions,), generator=generator).tolist()

# %% wrong="r1_recipe" because="the global generator draws the prompts"
- drawn = torch.randperm(len(prompts), generator=generator)[: sizes.questions].tolist()
+ drawn = torch.randperm(len(prompts))[: sizes.questions].tolist()

# %% wrong="r1_recipe" because="the reward gets the number within the batch"
- earned = [reward(n, answer) for n, answer in zip(numbers, answers, strict=True)]
+ earned = [reward(i // sizes.group, answer) for i, answer in enumerate(answers)]

# %% wrong="r1_recipe" because="the models share their parameters"
- cold = copy.deepcopy(base)
+ cold = copy.copy(base)

# %% wrong="r1_recipe" because="groups of equal rewards are left out: the mean is over fewer answers"
- weighted_step(rl, optimizer, tried, better.flatten().float())
+ use = (better != 0).any(1).repeat_interleave(sizes.group)
+ if not use.any():
+     use[:] = True
+ tried = [example for example, u in zip(tried, use.tolist()) if u]
+ weighted_step(rl, optimizer, tried, better.flatten()[use].float())

# %% wrong="r1_recipe" because="what was collected stands before the demonstrations"
- finetune(final, [*demonstrations, *collected], sizes.final_steps, sizes, generator)
+ finetune(final, [*collected, *demonstrations], sizes.final_steps, sizes, generator)

# %% right="r1_recipe" because="advantages in plain Python, a function for each stage"
def r1_recipe(base, demonstrations, prompts, reward, sizes, generator):
    def tuned(examples, steps):
        model = copy.deepcopy(base)
        finetune(model, examples, steps, sizes, generator)
        return model

    def attempts(model, numbers):
        return [
            (n, answer, reward(n, answer))
            for n, answer in zip(
                numbers, sample(model, [prompts[n] for n in numbers], sizes, generator)
            )
        ]

    cold = tuned(list(demonstrations), sizes.cold_steps)
    rl = copy.deepcopy(cold)
    adam = torch.optim.AdamW(rl.parameters(), lr=sizes.rl_lr, weight_decay=0.0)
    for _ in range(sizes.rl_steps):
        chosen = torch.randperm(len(prompts), generator=generator)[: sizes.questions]
        tried = attempts(rl, chosen.repeat_interleave(sizes.group).tolist())
        weights = []
        for start in range(0, len(tried), sizes.group):
            r = [float(x) for _, _, x in tried[start : start + sizes.group]]
            mean = math.fsum(r) / len(r)
            std = math.sqrt(math.fsum((x - mean) ** 2 for x in r) / (len(r) - 1))
            weights += [0.0 if max(r) == min(r) else (x - mean) / (std + 1e-4) for x in r]
        examples = [Example(prompts[n], answer) for n, answer, _ in tried]
        weighted_step(rl, adam, examples, torch.tensor(weights))
    collected = []
    numbers = torch.arange(len(prompts)).repeat_interleave(sizes.samples).tolist()
    for n, answer, earned in attempts(rl, numbers):
        example = Example(prompts[n], answer)
        if earned == 1 and (n, example) not in collected:
            collected.append((n, example))
    kept = [example for _, example in collected]
    return cold, rl, tuned(list(demonstrations) + kept, sizes.final_steps), kept

# %% wrong="questions" because="the limit of a vote is one sample's accuracy"
- "limit": 0.7,
+ "limit": 0.55,

# %% wrong="questions" because="one-sided"
- "flips": 2 * (1 + 9) / 2**9,
+ "flips": (1 + 9) / 2**9,

# %% wrong="questions" because="the ratio of counts"
- "clusters": 4.0,
+ "clusters": 16.0,

# %% wrong="questions" because="the biased estimate"
- "ten": 1 - math.comb(7, 5) / math.comb(10, 5),
+ "ten": 1 - 0.7**5,

# %% wrong="questions" because="the fixed point"
- "wait": 2 / 3 + 0.7**2 * (0.5 - 2 / 3),
+ "wait": 2 / 3,

# %% wrong="questions" because="what a prompt does not give"
- "kept": 1 - 0.75**8,
+ "kept": 0.75**8,

# %% right="questions" because="numbers"
def questions():
    return {
        "limit": 0.70,
        "ten": 0.9167,
        "clusters": 4,
        "flips": 0.0391,
        "wait": 0.585,
        "even": 1.232,
        "kept": 0.9,
    }
