# Right and wrong answers to the exercises of lesson 32: see CONTRIBUTING.md.

# %% wrong="verify" because="after a rejection, a draw from p, not from the residual"
- weights, accepted = (residual if residual.sum() > 0 else p[i]), i
+ weights, accepted = p[i], i

# %% wrong="verify" because="the test is u < q/p"
- if not u[i] * q[i, token] < p[i, token]:
+ if not u[i] * p[i, token] < q[i, token]:

# %% wrong="verify" because="greedy agreement in place of the ratio"
- if not u[i] * q[i, token] < p[i, token]:
+ if token != int(p[i].argmax()):

# %% wrong="verify" because="no early end: later tokens are tested after a rejection"
- weights, accepted = (residual if residual.sum() > 0 else p[i]), i
- break
+ weights, accepted = (residual if residual.sum() > 0 else p[i]), i

# %% wrong="verify" because="the residual is that of q over p"
- residual = (p[i] - q[i]).clamp(min=0)
+ residual = (q[i] - p[i]).clamp(min=0)

# %% wrong="verify" because="the residual's absolute difference"
- residual = (p[i] - q[i]).clamp(min=0)
+ residual = (p[i] - q[i]).abs()

# %% wrong="verify" because="the empty residual divides 0 by 0"
- weights, accepted = (residual if residual.sum() > 0 else p[i]), i
+ weights, accepted = residual / residual.sum(), i

# %% wrong="verify" because="no bonus token"
- return torch.cat([tokens[:accepted], drawn])
+ return torch.cat([tokens[:accepted], drawn])[: max(1, len(tokens))]

# %% wrong="verify" because="the draw reuses the uniform of the test"
- drawn = torch.searchsorted(cdf, u[-1:] * cdf[-1], right=True)
+ drawn = torch.searchsorted(cdf, u[accepted : accepted + 1] * cdf[-1], right=True)

# %% wrong="verify" because="the residual is not normalized"
- drawn = torch.searchsorted(cdf, u[-1:] * cdf[-1], right=True)
+ drawn = torch.searchsorted(cdf, u[-1:], right=True)

# %% wrong="verify" because="left search: a token of weight 0 at u = 0"
- drawn = torch.searchsorted(cdf, u[-1:] * cdf[-1], right=True)
+ drawn = torch.searchsorted(cdf, u[-1:] * cdf[-1])

# %% wrong="verify" because="in float32: close to 1, a token behind the last weight"
- p, q, u = target_probs.double(), draft_probs.double(), uniforms.double()
+ p, q, u = target_probs.float(), draft_probs.float(), uniforms.float()

# %% wrong="verify" because="the likeliest of the residual"
- drawn = torch.searchsorted(cdf, u[-1:] * cdf[-1], right=True)
+ drawn = weights.argmax(keepdim=True)

# %% wrong="verify" because="u = 0 accepts what the target never writes"
- if not u[i] * q[i, token] < p[i, token]:
+ if not u[i] * q[i, token] <= p[i, token]:

# %% wrong="verify" because="the residual is written into target_probs"
- residual = (p[i] - q[i]).clamp(min=0)
+ residual = target_probs[i].sub_(draft_probs[i]).clamp_(min=0).double()

# %% wrong="verify" because="the residual counts as empty only where p and q are equal bit for bit"
- weights, accepted = (residual if residual.sum() > 0 else p[i]), i
+ weights, accepted = (p[i] if torch.equal(p[i], q[i]) else residual), i

# %% right="verify" because="all ratios at once, and a search by hand"
def verify(draft_probs, target_probs, tokens, uniforms):
    p, q, u = (t.to(torch.float64) for t in (target_probs, draft_probs, uniforms))
    n = len(tokens)
    at = torch.arange(n)
    fine = u[:n] * q[at, tokens] < p[at, tokens]
    k = int(fine.long().cumprod(0).sum())
    rest = p[k].clone()
    if k < n:
        more = torch.relu(p[k] - q[k])
        rest = more if float(more.sum()) > 0 else rest
    running = rest.cumsum(0)
    goal = float(u[n]) * float(running[-1])
    choice = None
    for x in rest.nonzero()[:, 0].tolist():
        choice = x
        if goal < float(running[x]):
            break
    return torch.cat([tokens[:k], tokens.new_tensor([choice])])

# %% wrong="verify" because="a residual below a millionth counts as empty"
def verify(draft_probs: Tensor, target_probs: Tensor, tokens: Tensor, uniforms: Tensor) -> Tensor:
    q, p, u = draft_probs.double(), target_probs.double(), uniforms.double()
    accepted = 0
    while accepted < len(tokens):
        token = tokens[accepted]
        if u[accepted] * q[accepted, token] >= p[accepted, token]:
            break
        accepted += 1
    weights = p[accepted]
    if accepted < len(tokens):
        residual = (p[accepted] - q[accepted]).clamp(min=0)
        if residual.sum() > 1e-6:
            weights = residual
    cdf = weights.cumsum(0)
    x = torch.searchsorted(cdf, u[-1:] * cdf[-1], right=True)
    return torch.cat([tokens[:accepted], x])

# %% wrong="speedup" because="the closed form, 0/0 at alpha = 1"
- return float(sum(alpha**j for j in range(gamma + 1)))
+ return (1 - alpha ** (gamma + 1)) / (1 - alpha)

# %% wrong="speedup" because="only the accepted tokens"
- return float(sum(alpha**j for j in range(gamma + 1)))
+ return float(sum(alpha**j for j in range(1, gamma + 1)))

# %% wrong="speedup" because="verification is free"
- return expected_tokens(alpha, gamma) / (gamma * cost + 1 + gamma * verify_cost)
+ return expected_tokens(alpha, gamma) / (gamma * cost + 1)

# %% wrong="speedup" because="gamma + 1 further tokens are verified"
- return expected_tokens(alpha, gamma) / (gamma * cost + 1 + gamma * verify_cost)
+ return expected_tokens(alpha, gamma) / (gamma * cost + 1 + (gamma + 1) * verify_cost)

# %% wrong="speedup" because="at least one token is drafted"
- return max(range(largest + 1), key=lambda g: speedup(alpha, g, cost, verify_cost))
+ return max(range(1, largest + 1), key=lambda g: speedup(alpha, g, cost, verify_cost))

# %% wrong="speedup" because="the most tokens a round, whatever they cost"
- return max(range(largest + 1), key=lambda g: speedup(alpha, g, cost, verify_cost))
+ return max(range(largest + 1), key=lambda g: expected_tokens(alpha, g))

# %% wrong="speedup" because="best_gamma leaves out the cost of verifying"
- return max(range(largest + 1), key=lambda g: speedup(alpha, g, cost, verify_cost))
+ return max(range(largest + 1), key=lambda g: speedup(alpha, g, cost))

# %% wrong="speedup" because="the last gamma is left out"
- return max(range(largest + 1), key=lambda g: speedup(alpha, g, cost, verify_cost))
+ return max(range(max(1, largest)), key=lambda g: speedup(alpha, g, cost, verify_cost))

# %% wrong="speedup" because="the closed form with a branch for alpha = 1 alone: it cancels just below"
- return float(sum(alpha**j for j in range(gamma + 1)))
+ return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)

# %% wrong="speedup" because="alpha near 1 is taken for 1"
- return float(sum(alpha**j for j in range(gamma + 1)))
+ if 1 - alpha < 1e-8:
+     return gamma + 1.0
+ return (1 - alpha ** (gamma + 1)) / (1 - alpha)

# %% right="speedup" because="the closed form by expm1 and log, exact near 1"
import math
from fractions import Fraction


def expected_tokens(alpha: float, gamma: int) -> float:
    if alpha == 0:
        return 1.0
    if alpha == 1:
        return float(gamma + 1)
    # 1 - alpha^(gamma + 1) without a difference of nearly equal numbers; 1 - alpha is exact near 1
    return -math.expm1((gamma + 1) * math.log(alpha)) / (1 - alpha)


def speedup(alpha: float, gamma: int, cost: float, verify_cost: float = 0.0) -> float:
    if gamma == 0:
        return 1.0
    return expected_tokens(alpha, gamma) / (1 + gamma * (cost + verify_cost))


def best_gamma(alpha: float, cost: float, verify_cost: float = 0.0, largest: int = 16) -> int:
    a, each = Fraction(alpha), Fraction(cost) + Fraction(verify_cost)
    tokens, duration, power = Fraction(1), Fraction(1), Fraction(1)
    best, highest = 0, Fraction(1)
    for gamma in range(1, largest + 1):
        power *= a
        tokens += power
        duration += each
        if tokens / duration > highest:
            best, highest = gamma, tokens / duration
    return best

# %% right="speedup" because="by recursion, and by climbing while it pays"
def expected_tokens(alpha, gamma):
    total = 1.0
    for _ in range(gamma):
        total = 1.0 + alpha * total
    return total


def speedup(alpha, gamma, cost, verify_cost=0.0):
    return expected_tokens(alpha, gamma) / (1 + gamma * (cost + verify_cost))


def best_gamma(alpha, cost, verify_cost=0.0, largest=16):
    best = 0
    for gamma in range(1, largest + 1):
        if speedup(alpha, gamma, cost, verify_cost) > speedup(alpha, best, cost, verify_cost):
            best = gamma
    return best

# %% wrong="speedup" because="the largest of several that are best"
- return max(range(largest + 1), key=lambda g: speedup(alpha, g, cost, verify_cost))
+ return max((speedup(alpha, g, cost, verify_cost), g) for g in range(largest + 1))[1]

# %% wrong="speculative_generate" because="the target's cache keeps the rejected tokens"
- for reader in (target, draft):  # the last token was drawn, and has been read by nobody
+ for reader in (draft,):

# %% wrong="speculative_generate" because="the draft's cache keeps the rejected tokens"
- for reader in (target, draft):  # the last token was drawn, and has been read by nobody
+ for reader in (target,):

# %% wrong="speculative_generate" because="rolled back one token too few"
- reader.rollback(min(len(reader), len(text) - 1))
+ reader.rollback(min(len(reader), len(text)))

# %% wrong="speculative_generate" because="everything is read again in each round"
- reader.rollback(min(len(reader), len(text) - 1))
+ reader.rollback(0)

# %% wrong="speculative_generate" because="the draft lacks its last token after a full acceptance"
- q = draft.read((text + drafted)[len(draft) :])[-1]
+ q = draft.read((text + drafted)[-1:] if len(draft) else text)[-1]

# %% wrong="speculative_generate" because="greedy drafts, tested as if they were drawn"
- drafted.append(int(torch.multinomial(q, 1, generator=generator)))
+ drafted.append(int(q.argmax()))

# %% wrong="speculative_generate" because="the rows are shifted by one"
- p = target.read((text + drafted)[len(target) :])[-count - 1 :]
+ p = target.read((text + drafted)[len(target) :])
+ p = p.roll(1, 0)[-count - 1 :]

# %% wrong="speculative_generate" because="the last round writes too many"
- count = min(gamma, end - len(text) - 1)
+ count = gamma

# %% wrong="speculative_generate" because="the last round is cut, not shortened"
- count = min(gamma, end - len(text) - 1)
+ count = gamma

- return text[len(prompt) :], accepted
+ return text[len(prompt) : len(prompt) + max_new_tokens], accepted

# %% wrong="speculative_generate" because="stops only where stop ends the round"
- if stop in new:
-     new = new[: new.index(stop) + 1]
-     end = len(text) + len(new)
+ if new[-1] == stop:
+     end = len(text) + len(new)

# %% wrong="speculative_generate" because="the stop token is left out of the text"
- new = new[: new.index(stop) + 1]
+ new = new[: new.index(stop)]

# %% wrong="speculative_generate" because="uniforms from the global generator"
- uniforms = torch.rand(count + 1, generator=generator, device=p.device, dtype=torch.float64)
+ uniforms = torch.rand(count + 1, device=p.device, dtype=torch.float64)

# %% wrong="speculative_generate" because="the target alone, no draft"
- count = min(gamma, end - len(text) - 1)
+ count = 0

# %% wrong="speculative_generate" because="the prompt is extended in place"
- text, accepted = list(prompt), []
- end = len(prompt) + max_new_tokens
+ text, accepted = prompt, []
+ start = len(prompt)
+ end = len(prompt) + max_new_tokens

- return text[len(prompt) :], accepted
+ return text[start:], accepted

# %% wrong="speculative_generate" because="the whole text is returned"
- return text[len(prompt) :], accepted
+ return text, accepted

# %% wrong="speculative_generate" because="the target reads token by token"
- p = target.read((text + drafted)[len(target) :])[-count - 1 :]
+ rows = [target.read([token]) for token in (text + drafted)[len(target) :]]
+ p = torch.cat(rows)[-count - 1 :]

# %% wrong="speculative_generate" because="rolled back before the text is cut at stop"
- if stop in new:
-     new = new[: new.index(stop) + 1]
-     end = len(text) + len(new)
  text += new
  for reader in (target, draft):  # the last token was drawn, and has been read by nobody
      reader.rollback(min(len(reader), len(text) - 1))
+ if stop in new:
+     del text[len(text) - len(new) + new.index(stop) + 1 :]
+     break

# %% wrong="speculative_generate" because="at stop only the accepted tokens that stay are counted"
- accepted.append(len(new) - 1)
- if stop in new:
+ if stop in new:

- text += new
+ accepted.append(len(new) - 1)
+ text += new

# %% right="speculative_generate" because="lengths counted by hand"
def speculative_generate(target, draft, prompt, max_new_tokens, gamma, stop=None, generator=None):
    out, accepted = [], []
    while len(out) < max_new_tokens:
        text = [*prompt, *out]
        guess, rows = [], []
        while len(guess) < min(gamma, max_new_tokens - len(out) - 1):
            fresh = text[len(draft) :] if not guess else guess[-1:]
            rows.append(draft.read(fresh)[-1])
            guess.append(torch.multinomial(rows[-1], 1, generator=generator).item())
        p = target.read([*text[len(target) :], *guess])
        p = p[len(p) - len(guess) - 1 :]
        q = torch.stack(rows) if rows else torch.zeros(0, p.shape[1], device=p.device)
        u = torch.rand(len(guess) + 1, generator=generator, device=p.device)
        new = verify(q, p, torch.tensor(guess, dtype=torch.int64, device=p.device), u).tolist()
        accepted.append(len(new) - 1)
        good = len(text) + len(new) - 1
        target.rollback(good)
        draft.rollback(min(good, len(draft)))
        for token in new:
            out.append(token)
            if token == stop:
                keep = len(prompt) + len(out) - 1
                target.rollback(min(len(target), keep))
                draft.rollback(min(len(draft), keep))
                return out, accepted
    return out, accepted

# %% wrong="prompt_lookup_draft" because="the first place, not the latest"
- for start in range(len(tokens) - n - 1, -1, -1):
+ for start in range(len(tokens) - n):

# %% wrong="prompt_lookup_draft" because="the shortest match first"
- for n in range(min(longest, len(tokens) - 1), 0, -1):
+ for n in range(1, min(longest, len(tokens) - 1) + 1):

# %% wrong="prompt_lookup_draft" because="the text's own end matches itself"
- for start in range(len(tokens) - n - 1, -1, -1):
+ for start in range(len(tokens) - n, -1, -1):

# %% wrong="prompt_lookup_draft" because="only the longest n"
- for n in range(min(longest, len(tokens) - 1), 0, -1):
+ for n in [min(longest, len(tokens) - 1)]:

# %% wrong="prompt_lookup_draft" because="the match is proposed too"
- return list(tokens[start + n : start + n + gamma])
+ return list(tokens[start : start + gamma])

# %% wrong="prompt_lookup_draft" because="gamma is ignored"
- return list(tokens[start + n : start + n + gamma])
+ return list(tokens[start + n :])

# %% wrong="prompt_lookup_draft" because="no overlap allowed"
- for start in range(len(tokens) - n - 1, -1, -1):
+ for start in range(len(tokens) - 2 * n, -1, -1):

# %% right="prompt_lookup_draft" because="a dictionary of places"
def prompt_lookup_draft(tokens, gamma, longest=3):
    for n in range(longest, 0, -1):
        places = {}
        for end in range(n, len(tokens)):
            places[tuple(tokens[end - n : end])] = end
        end = places.get(tuple(tokens[-n:])) if len(tokens) >= n else None
        if end is not None:
            return tokens[end : end + gamma]
    return []

# %% wrong="tree_attention_mask" because="causal"
- mask[i] |= mask[parent]
+ mask[i, :i] = True

# %% wrong="tree_attention_mask" because="parents, not all ancestors"
- mask[i] |= mask[parent]
+ mask[i, parent] = True

# %% wrong="tree_attention_mask" because="transposed"
- return mask
+ return mask.T

# %% wrong="tree_attention_mask" because="a node does not see itself"
- return mask
+ return mask & ~torch.eye(len(parents), dtype=torch.bool)

# %% wrong="tree_attention_mask" because="-1 is taken for the last node"
- if parent >= 0:
-     mask[i] |= mask[parent]
+ mask[i] |= mask[parent]

# %% wrong="tree_attention_mask" because="parents are not checked"
- if not -1 <= parent < i:
+ if False:

# %% wrong="tree_attention_mask" because="a node may be its own parent"
- if not -1 <= parent < i:
+ if not -1 <= parent <= i:

# %% wrong="tree_attention_mask" because="-2 is let through"
- if not -1 <= parent < i:
+ if not parent < i:

# %% wrong="tree_attention_mask" because="repeated squaring, too few times for deep trees"
- return mask
+ nodes = len(parents)
+ sees = torch.eye(nodes)
+ for i, parent in enumerate(parents):
+     if parent >= 0:
+         sees[i, parent] = 1
+ for _ in range(int(math.log2(max(nodes, 1)))):
+     sees = (sees @ sees).clamp(max=1)
+ return sees > 0

# %% right="tree_attention_mask" because="climbs from each node"
def tree_attention_mask(parents):
    rows = []
    for i, parent in enumerate(parents):
        if parent < -1 or parent >= i:
            raise ValueError("a parent must stand before its child")
        seen, node = [False] * len(parents), i
        while node != -1:
            seen[node] = True
            node = parents[node]
        rows.append(seen)
    return torch.tensor(rows, dtype=torch.bool).reshape(len(parents), len(parents))

# %% wrong="accept_path" because="the parent is not asked"
- if parent == at and token == wanted:
+ if token == wanted:

# %% wrong="accept_path" because="the token is not asked"
- if parent == at and token == wanted:
+ if parent == at:

# %% wrong="accept_path" because="compares with the choice after the node itself"
- if parent == at and token == wanted:
+ if parent == at and token == choices[i]:

# %% wrong="accept_path" because="the bonus token is the last accepted one"
- return path, wanted
+ return path, tokens[path[-1]] if path else first

# %% wrong="accept_path" because="ends at the first node that does not fit"
- if parent == at and token == wanted:
-     path.append(i)
-     at, wanted = i, choices[i]
+ if parent != at or token != wanted:
+     break
+ path.append(i)
+ at, wanted = i, choices[i]

# %% wrong="accept_path" because="tokens in place of nodes"
- path.append(i)
+ path.append(token)

# %% right="accept_path" because="a dictionary of children"
def accept_path(parents, tokens, first, choices):
    child = {(p, t): i for i, (p, t) in enumerate(zip(parents, tokens, strict=True))}
    path, want = [], first
    while (path[-1] if path else -1, want) in child:
        path.append(child[path[-1] if path else -1, want])
        want = choices[path[-1]]
    return path, want

# %% wrong="roll_back_rows" because="one offset for all rows: the smallest"
- left = mask.sum(1) - drop
+ drop = drop.min().expand(len(drop))
+ left = mask.sum(1) - drop

# %% wrong="roll_back_rows" because="one offset for all rows: the largest"
- left = mask.sum(1) - drop
+ drop = drop.max().expand(len(drop))
+ left = (mask.sum(1) - drop).clamp(min=0)

# %% wrong="roll_back_rows" because="the rejected stay, under a shorter mask"
- columns = torch.arange(length - width, length, device=mask.device) - drop[:, None]
+ columns = torch.arange(length - width, length, device=mask.device) - 0 * drop[:, None]

# %% wrong="roll_back_rows" because="the first tokens are forgotten"
- columns = torch.arange(length - width, length, device=mask.device) - drop[:, None]
+ columns = torch.arange(length - width, length, device=mask.device) + 0 * drop[:, None]

# %% wrong="roll_back_rows" because="the old width stays"
- length, width = mask.shape[1], int(left.max())
+ length, width = mask.shape[1], mask.shape[1]

# %% wrong="roll_back_rows" because="keys move, values stay"
- return [(shifted(k), shifted(v)) for k, v in layers], new_mask
+ return [(shifted(k), v[:, :, length - width :]) for k, v in layers], new_mask

# %% wrong="roll_back_rows" because="the first layer alone"
- return [(shifted(k), shifted(v)) for k, v in layers], new_mask
+ return [(shifted(k), shifted(v)) for k, v in layers[:1]], new_mask

# %% wrong="roll_back_rows" because="tokens at the left, padding at the right"
- new_mask = torch.arange(width, device=mask.device) >= width - left[:, None]
+ new_mask = torch.arange(width, device=mask.device) < left[:, None]

# %% wrong="roll_back_rows" because="the mask ignores the padding that was there"
- new_mask = torch.arange(width, device=mask.device) >= width - left[:, None]
+ new_mask = torch.arange(width, device=mask.device) >= drop[:, None] - drop.min()

# %% wrong="roll_back_rows" because="where nothing is forgotten the inputs come back, padding and all"
- left = mask.sum(1) - drop
+ if not drop.any():
+     return layers, mask
+ left = mask.sum(1) - drop

# %% wrong="roll_back_rows" because="where all rows forget equally many, views of the inputs"
- left = mask.sum(1) - drop
+ left = mask.sum(1) - drop
+ if (drop == drop[0]).all():
+     keep = slice(mask.shape[1] - int(drop[0] + left.max()), mask.shape[1] - int(drop[0]))
+     return [(k[:, :, keep], v[:, :, keep]) for k, v in layers], mask[:, keep]

# %% wrong="roll_back_rows" because="the input mask where no row changes"
- return [(shifted(k), shifted(v)) for k, v in layers], new_mask
+ return [(shifted(k), shifted(v)) for k, v in layers], (
+     mask if mask.shape == new_mask.shape and mask.equal(new_mask) else new_mask
+ )

# %% wrong="roll_back_rows" because="all forgotten: a slice from -0 on keeps every column"
def roll_back_rows(
    layers: list[tuple[Tensor, Tensor]], mask: Tensor, drop: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    length = mask.shape[1]
    left = mask.sum(1) - drop
    width = int(left.max())
    columns = torch.arange(length, device=mask.device)
    index = (columns - drop[:, None]).clamp(min=0)

    def shift(x: Tensor) -> Tensor:
        full = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, full)[:, :, -width:].contiguous()

    new_mask = columns >= length - left[:, None]
    return [(shift(k), shift(v)) for k, v in layers], new_mask[:, -width:].contiguous()

# %% right="roll_back_rows" because="row by row into zeros"
def roll_back_rows(layers, mask, drop):
    ends = mask.shape[1] - drop
    starts = (~mask).sum(1)
    sizes = (ends - starts).tolist()
    width = max(sizes)
    out = []
    for pair in layers:
        new = []
        for x in pair:
            y = x.new_zeros(x.shape[0], x.shape[1], width, x.shape[3])
            for b, n in enumerate(sizes):
                y[b, :, width - n :] = x[b, :, int(starts[b]) : int(ends[b])]
            new.append(y)
        out.append(tuple(new))
    new_mask = torch.tensor([[False] * (width - n) + [True] * n for n in sizes], dtype=torch.bool)
    return out, new_mask

# %% wrong="mtp_self_speculation" because="the trunk's cache keeps the rejected tokens"
- trunk.truncate(len(trunk) - count + kept)
+ trunk.truncate(len(trunk))

# %% wrong="mtp_self_speculation" because="the block's cache keeps its guesses"
- ahead.truncate(known)
+ ahead.truncate(len(ahead))

# %% wrong="mtp_self_speculation" because="the block sees the token at i, not the one after"
- following = [*prompt[1:], *written]  # the token after each state in `hidden`
+ following = list(prompt)

# %% wrong="mtp_self_speculation" because="the block never read the prompt"
- following = [*prompt[1:], *written]  # the token after each state in `hidden`
+ hidden, following = hidden[:, -1:], list(written)

# %% wrong="mtp_self_speculation" because="the block reads the last pair alone after each round"
- hidden, following = hidden[:, : kept + 1], choices[: kept + 1]
- written += following
+ written += choices[: kept + 1]
+ hidden, following = hidden[:, kept : kept + 1], choices[kept : kept + 1]

# %% wrong="mtp_self_speculation" because="drafts are not checked"
- while kept < count and choices[kept] == drafted[kept]:
+ while kept < count:

# %% wrong="mtp_self_speculation" because="no token of the trunk's own after a rejection"
- hidden, following = hidden[:, : kept + 1], choices[: kept + 1]
+ hidden, following = hidden[:, : max(kept, 1)], choices[: max(kept, 1)]

# %% wrong="mtp_self_speculation" because="each round drafts one token"
- count = min(gamma, max_new_tokens - len(written) - 1)
+ count = min(gamma, 1, max_new_tokens - len(written) - 1)

# %% wrong="mtp_self_speculation" because="further drafts use the trunk's state again"
- state = mtp(state[:, -1:], model.embed_tokens(tensor(drafted[-1:])), ahead)
+ state = mtp(hidden[:, -1:], model.embed_tokens(tensor(drafted[-1:])), ahead)

# %% wrong="mtp_self_speculation" because="entries of accepted tokens, made from guesses, stay"
@torch.inference_mode()
def mtp_self_speculation(
    model: Llama, mtp: MTP, prompt: list[int], max_new_tokens: int, gamma: int = 1
) -> tuple[list[int], list[int]]:
    if max_new_tokens == 0:
        return [], []
    weight = model.embed_tokens.weight

    def ids(tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=weight.device)

    def likeliest(states: Tensor) -> list[int]:
        return F.linear(states, weight)[0].argmax(-1).tolist()

    cache, side = Cache(), Cache()
    states = model.hidden(ids(prompt), cache)
    text = [*prompt, likeliest(states[:, -1:])[0]]
    end, seen, accepted = len(prompt) + max_new_tokens, 0, []
    while len(text) < end:
        count = min(gamma, end - len(text) - 1)
        drafted = []
        if count > 0:
            out = mtp(states, model.embed_tokens(ids(text[seen + 1 :])), side)[:, -1:]
            seen = len(text) - 1
            drafted = likeliest(out)
            while len(drafted) < count:
                out = mtp(out, model.embed_tokens(ids(drafted[-1:])), side)
                drafted += likeliest(out)
        fresh = model.hidden(ids([text[-1], *drafted]), cache)
        choices = likeliest(fresh)
        kept = 0
        while kept < count and drafted[kept] == choices[kept]:
            kept += 1
        accepted.append(kept)
        text += [*drafted[:kept], choices[kept]]
        cache.truncate(len(text) - 1)
        if count > 0:
            good = min(kept, count - 1)  # entries of the block that are about accepted tokens
            seen += good
            side.truncate(seen)
            states = fresh[:, good : kept + 1]
        else:
            states = torch.cat([states, fresh], dim=1)
    return text[len(prompt) :], accepted

# %% wrong="mtp_self_speculation" because="writes the first token for max_new_tokens = 0 too"
- written, accepted = best(hidden)[-1:][:max_new_tokens], []
+ written, accepted = best(hidden)[-1:], []

# %% wrong="mtp_self_speculation" because="few calls, but the block reads the whole text in each round"
- hidden, following = hidden[:, : kept + 1], choices[: kept + 1]
- written += following
+ ahead, following = Cache(), [*following, *choices[: kept + 1]]
+ states = torch.cat([states, hidden[:, : kept + 1]], dim=1)
+ hidden, written = states, [*written, *choices[: kept + 1]]

- following = [*prompt[1:], *written]  # the token after each state in `hidden`
+ following, states = [*prompt[1:], *written], hidden

# %% wrong="mtp_self_speculation" because="without caches, everything read again"
def mtp_self_speculation(model, mtp, prompt, max_new_tokens, gamma=1):
    with torch.no_grad():
        table = model.embed_tokens.weight

        def ids(row):
            return torch.tensor([row], device=table.device)

        text, rounds = list(prompt), []
        end = len(prompt) + max_new_tokens
        if max_new_tokens:
            text.append(int((model.hidden(ids(text))[0, -1] @ table.T).argmax()))
        while len(text) < end:
            guess = []
            states = model.hidden(ids(text[:-1]))
            while len(guess) < min(gamma, end - len(text) - 1):
                out = mtp(states, model.embed_tokens(ids(text[1:] + guess)))
                guess.append(int((out[0, -1] @ table.T).argmax()))
                states = torch.cat([states, out[:, -1:]], dim=1)
            wish = (model.hidden(ids(text + guess))[0] @ table.T).argmax(-1).tolist()
            wish = wish[len(text) - 1 :]
            k = 0
            while k < len(guess) and guess[k] == wish[k]:
                k += 1
            rounds.append(k)
            text += wish[: k + 1]
        return text[len(prompt) :], rounds

# %% right="mtp_self_speculation" because="all states kept, the block reads from its cache's length"
def mtp_self_speculation(model, mtp, prompt, max_new_tokens, gamma=1):
    with torch.no_grad():
        table = model.embed_tokens.weight

        def ids(row):
            return torch.tensor([row], device=table.device)

        trunk, ahead, text, rounds = Cache(), Cache(), list(prompt), []
        end = len(prompt) + max_new_tokens
        states = model.hidden(ids(text), trunk)
        if max_new_tokens:
            text.append(int((states[0, -1] @ table.T).argmax()))
        while len(text) < end:
            guess, out = [], None
            for _ in range(min(gamma, end - len(text) - 1)):
                at = len(ahead)
                if out is None:
                    out = mtp(states[:, at:], model.embed_tokens(ids(text[at + 1 :])), ahead)
                else:
                    out = mtp(out[:, -1:], model.embed_tokens(ids(guess[-1:])), ahead)
                guess.append(int((out[0, -1] @ table.T).argmax()))
            ahead.truncate(len(text) - 1)
            new = model.hidden(ids([text[-1], *guess]), trunk)
            wish = (new[0] @ table.T).argmax(-1).tolist()
            k = 0
            while k < len(guess) and guess[k] == wish[k]:
                k += 1
            states = torch.cat([states, new[:, : k + 1]], dim=1)
            trunk.truncate(len(text) + k)
            text += wish[: k + 1]
            rounds.append(k)
        return text[len(prompt) :], rounds

# %% right="mtp_self_speculation" because="the block reads the new pairs at the end of each round"
@torch.inference_mode()
def mtp_self_speculation(
    model: Llama, mtp: MTP, prompt: list[int], max_new_tokens: int, gamma: int = 1
) -> tuple[list[int], list[int]]:
    if max_new_tokens < 1:
        return [], []
    weight = model.embed_tokens.weight

    def row(tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], dtype=torch.int64, device=weight.device)

    def greedy(states: Tensor) -> Tensor:
        return F.linear(states[0], weight).argmax(-1)

    trunk_cache, block_cache = Cache(), Cache()
    states = model.hidden(row(prompt), trunk_cache)
    written = [int(greedy(states)[-1])]
    pairs = len(prompt)  # true pairs in the block's cache
    ready = mtp(states, model.embed_tokens(row([*prompt[1:], *written])), block_cache)[:, -1:]
    accepted = []
    while len(written) < max_new_tokens:
        count = min(gamma, max_new_tokens - len(written) - 1)
        guess, state = [], ready
        for place in range(count):
            if place > 0:
                state = mtp(state, model.embed_tokens(row(guess[-1:])), block_cache)[:, -1:]
            guess.append(int(greedy(state)[-1]))
        states = model.hidden(row(written[-1:] + guess), trunk_cache)
        chosen = greedy(states)
        agree = chosen[:count] == row(guess)[0]
        kept = int(agree.long().cumprod(0).sum())
        accepted.append(kept)
        new = chosen[: kept + 1].tolist()  # where they agree, the choices are the draft
        written += new
        trunk_cache.truncate(len(prompt) + len(written) - 1)
        block_cache.truncate(pairs)
        ready = mtp(states[:, : kept + 1], model.embed_tokens(row(new)), block_cache)[:, -1:]
        pairs += kept + 1
    return written, accepted

# %% wrong="questions" because="total variation, q's share, no normalization, no own token, alpha alone"
- "alpha": 0.2 + 0.3 + 0.1,
- "residual": 1.0,
- "argmax": 0.8,
- "limit": 1 / (1 - 0.8),
- "batch": 0,
+ "alpha": 0.4,
+ "residual": 0.6,
+ "argmax": 0.6,
+ "limit": 4.0,
+ "batch": 8,

# %% wrong="questions" because="ratios, halves and one draft"
- "alpha": 0.2 + 0.3 + 0.1,
- "residual": 1.0,
- "argmax": 0.8,
- "limit": 1 / (1 - 0.8),
- "batch": 0,
+ "alpha": 2.2 / 3,
+ "residual": 0.4,
+ "argmax": 0.2,
+ "limit": 1.25,
+ "batch": 1,

# %% right="questions" because="as numbers"
def questions():
    return {"alpha": 0.6, "residual": 1, "argmax": 0.8, "limit": 5.0, "batch": 0}
