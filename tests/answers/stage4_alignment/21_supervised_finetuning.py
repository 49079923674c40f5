# Right and wrong answers to the exercises of lesson 21: see CONTRIBUTING.md.

# %% wrong="render_chat" because="roles are put in by string, so a user can forge them"
def render_chat(messages, generation_prompt=False, keep_reasoning="all"):
    text, spans = "", []
    for m in messages:
        text += f"<|{m['role']}|>"
        start = len(tokenizer.encode(text, special=True))
        text += m["content"] + "<|end|>"
        if m["role"] == "assistant":
            spans.append((start, len(tokenizer.encode(text, special=True))))
    ids = tokenizer.encode(text, special=True)
    return ids + [SPECIAL["<|assistant|>"]] * generation_prompt, spans

# %% wrong="render_chat" because="all parts by string, forgeable"
-         ids += tokenizer.encode(message["content"])
+         ids += tokenizer.encode(message["content"], special=True)

# %% wrong="render_chat" because="a call can be forged"
-             ids += [SPECIAL["<|call|>"], *tokenizer.encode(call), SPECIAL["<|/call|>"]]
+             ids += tokenizer.encode(f"<|call|>{call}<|/call|>", special=True)

# %% wrong="render_chat" because="the stop token belongs to nobody"
-         if mine and i >= first_kept:
-             spans.append((start, len(ids)))
+         if mine and i >= first_kept:
+             spans.append((start, len(ids) - 1))

# %% wrong="render_chat" because="the header is in the span"
-         start = len(ids)
-         mine = role == "assistant"
+         start = len(ids) - 1
+         mine = role == "assistant"

# %% wrong="render_chat" because="the reasoning is not in the span"
-             ids += [SPECIAL["<|think|>"], *thought, SPECIAL["<|/think|>"]]
+             ids += [SPECIAL["<|think|>"], *thought, SPECIAL["<|/think|>"]]
+             start = len(ids)

# %% wrong="render_chat" because="the stop token only where the conversation ends"
-         ids.append(END)
-         if mine and i >= first_kept:
-             spans.append((start, len(ids)))
+         ids.append(END)
+         if mine and i >= first_kept:
+             spans.append((start, len(ids) - (i + 1 < len(messages))))

# %% wrong="render_chat" because="reasoning only in the last message"
-         if mine and message.get("reasoning") and i >= first_kept:
+         kept = keep_reasoning == "all" or i == len(messages) - 1
+         if mine and message.get("reasoning") and kept:

# %% wrong="render_chat" because="keep_reasoning is ignored"
-         first_kept = users[-1] if users else 0
+         first_kept = 0

# %% wrong="render_chat" because="replies whose reasoning was dropped are trained"
-         if mine and i >= first_kept:
-             spans.append((start, len(ids)))
+         if mine:
+             spans.append((start, len(ids)))

# %% wrong="render_chat" because="empty reasoning leaves its tokens"
-         if mine and message.get("reasoning") and i >= first_kept:
+         if mine and "reasoning" in message and i >= first_kept:

# %% wrong="render_chat" because="reasoning of any role"
-         if mine and message.get("reasoning") and i >= first_kept:
+         if message.get("reasoning") and i >= first_kept:

# %% wrong="render_chat" because="any role with a token will do"
-         if role not in ("system", "user", "assistant", "tool"):
+         if f"<|{role}|>" not in SPECIAL:

# %% wrong="render_chat" because="the generation prompt has a span"
-         ids.append(SPECIAL["<|assistant|>"])
+         ids.append(SPECIAL["<|assistant|>"])
+         spans.append((len(ids), len(ids)))

# %% wrong="render_chat" because="no generation prompt"
-         ids.append(SPECIAL["<|assistant|>"])
+         pass

# %% wrong="render_chat" because="unknown keep_reasoning is taken"
-     if keep_reasoning not in ("all", "last"):
+     if keep_reasoning is None:

# %% wrong="render_chat" because="a line feed after each header"
-         ids += tokenizer.encode(message["content"])
+         ids += tokenizer.encode("\n" + message["content"])

# %% wrong="render_chat" because="calls before the content"
-         ids += tokenizer.encode(message["content"])
+         calls = message.get("calls") or () if mine else ()
+         for call in calls:
+             ids += [SPECIAL["<|call|>"], *tokenizer.encode(call), SPECIAL["<|/call|>"]]
+         ids += tokenizer.encode(message["content"])
-         for call in message.get("calls") or () if mine else ():
+         for call in ():

# %% wrong="render_chat" because="reasoning is removed from the messages themselves"
-         if mine and message.get("reasoning") and i >= first_kept:
-             thought = tokenizer.encode(message["reasoning"])
+         if mine and message.get("reasoning") and i >= first_kept:
+             thought = tokenizer.encode(message.pop("reasoning"))

# %% wrong="render_chat" because="without a user message everything counts as over"
-         first_kept = users[-1] if users else 0
+         first_kept = users[-1] if users else len(messages)

# %% right="render_chat" because="message by message, with a helper for each part"
def render_chat(messages, generation_prompt=False, keep_reasoning="all"):
    if keep_reasoning not in ("all", "last"):
        raise ValueError(keep_reasoning)

    def wrapped(name, text, close=None):
        closing = [SPECIAL[close]] if close else []
        return [SPECIAL[name], *tokenizer.encode(text), *closing]

    ids, spans = [], []
    for i, m in enumerate(messages):
        role = m["role"]
        if role not in {"system", "user", "assistant", "tool"}:
            raise ValueError(role)
        over = keep_reasoning == "last" and any(n["role"] == "user" for n in messages[i:])
        body = tokenizer.encode(m["content"])
        if role == "assistant":
            if m.get("reasoning") and not over:
                body = wrapped("<|think|>", m["reasoning"], "<|/think|>") + body
            for call in m.get("calls", []):
                body = body + wrapped("<|call|>", call, "<|/call|>")
        elif role == "system" and m.get("tools"):
            body = body + wrapped("<|tools|>", m["tools"])
        ids = [*ids, SPECIAL[f"<|{role}|>"], *body, SPECIAL["<|end|>"]]
        if role == "assistant" and not over:
            spans.append((len(ids) - len(body) - 1, len(ids)))
    return ids + ([SPECIAL["<|assistant|>"]] if generation_prompt else []), spans

# %% wrong="turn_examples" because="one example with everything"
def turn_examples(messages):
    return [render_chat(messages)] if messages else []

# %% wrong="turn_examples" because="only the last turn"
def turn_examples(messages):
    ids, spans = render_chat(messages, keep_reasoning="last")
    return [(ids, spans)] if spans else []

# %% wrong="turn_examples" because="old reasoning is kept"
-     rendered = [
-         render_chat(messages[:cut], keep_reasoning="last") for cut in (*cuts, len(messages))
-     ]
+     rendered = [render_chat(messages[:cut]) for cut in (*cuts, len(messages))]

# %% wrong="turn_examples" because="the end is forgotten"
-     rendered = [
-         render_chat(messages[:cut], keep_reasoning="last") for cut in (*cuts, len(messages))
-     ]
+     rendered = [render_chat(messages[:cut], keep_reasoning="last") for cut in cuts]

# %% wrong="turn_examples" because="each turn without what came before"
-     rendered = [
-         render_chat(messages[:cut], keep_reasoning="last") for cut in (*cuts, len(messages))
-     ]
+     ends = [*cuts, len(messages)]
+     rendered = [render_chat(messages[a:b]) for a, b in zip([0, *ends], ends, strict=False)]

# %% wrong="turn_examples" because="examples without a reply stay"
-     return [(ids, spans) for ids, spans in rendered if spans]
+     return rendered

# %% right="turn_examples" because="grows the conversation message by message"
def turn_examples(messages):
    examples, so_far = [], []
    for message in [*messages, {"role": "user", "content": ""}]:
        if message["role"] == "user":
            ids, spans = render_chat(list(so_far), keep_reasoning="last")
            if len(spans) > 0:
                examples.append((ids, spans))
        so_far.append(message)
    return examples

# %% wrong="build_labels" because="the stop token is left out"
-         labels[start:end] = ids[start:end]
+         labels[start : end - 1] = ids[start : end - 1]

# %% wrong="build_labels" because="shifted, as the loss will do once more"
-     return labels
+     return [*labels[1:], IGNORE][: len(labels)]

# %% wrong="build_labels" because="every token counts"
def build_labels(ids, spans):
    return list(ids)

# %% wrong="build_labels" because="the last span only"
-         labels[start:end] = ids[start:end]
+         labels = [t if start <= i < end else IGNORE for i, t in enumerate(ids)]

# %% wrong="build_labels" because="bad spans are taken"
-         if not 0 <= start <= end <= len(ids):
+         if start > len(ids):

# %% wrong="build_labels" because="spans of no tokens are refused"
-         if not 0 <= start <= end <= len(ids):
+         if not 0 <= start < end <= len(ids):

# %% wrong="build_labels" because="the ids themselves are overwritten" base="in-place"
def build_labels(ids, spans):
    inside = {i for start, end in spans for i in range(start, end)}
    if any(not 0 <= a <= b <= len(ids) for a, b in spans):
        raise ValueError("span")
    for i in range(len(ids)):
        if i not in inside:
            ids[i] = IGNORE
    return ids

# %% right="build_labels" because="one pass over the tokens"
def build_labels(ids, spans):
    for a, b in spans:
        if a < 0 or b > len(ids) or a > b:
            raise ValueError("a span lies outside")
    return [t if any(a <= i < b for a, b in spans) else IGNORE for i, t in enumerate(ids)]

# %% wrong="sft_loss" because="no shift"
-     targets = labels[:, 1:].flatten()
+     targets = labels[:, :-1].flatten()

# %% wrong="sft_loss" because="items is ignored"
-     if items is None:
+     if True:

# %% wrong="sft_loss" because="the mean of the batch times items"
-     return total / items
+     return total / max(int((targets != IGNORE).sum()), 1) * items

# %% wrong="sft_loss" because="divided by all positions"
-         items = max(int((targets != IGNORE).sum()), 1)
+         items = targets.numel()

# %% wrong="sft_loss" because="the first label is counted, though nothing predicts it"
-         items = max(int((targets != IGNORE).sum()), 1)
+         items = max(int((labels != IGNORE).sum()), 1)

# %% wrong="sft_loss" because="NaN where nothing counts"
-         items = max(int((targets != IGNORE).sum()), 1)
+         items = int((targets != IGNORE).sum())

# %% wrong="sft_loss" because="half precision is not widened"
-         logits[:, :-1].flatten(0, 1).to(wide), targets, ignore_index=IGNORE, reduction="sum"
+         logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"

# %% wrong="sft_loss" because="float64 is narrowed"
-     wide = torch.promote_types(logits.dtype, torch.float32)
+     wide = torch.float32

# %% wrong="sft_loss" because="log of softmax, which underflows"
def sft_loss(logits, labels, items=None):
    wide = torch.promote_types(logits.dtype, torch.float32)
    targets = labels[:, 1:]
    real = targets != IGNORE
    p = logits[:, :-1].to(wide).softmax(-1)
    nll = -p.gather(-1, targets.masked_fill(~real, 0)[..., None])[..., 0].log()
    return nll.masked_fill(~real, 0).sum() / (items or max(int(real.sum()), 1))

# %% wrong="sft_loss" because="the mean of the sequences' means"
def sft_loss(logits, labels, items=None):
    wide = torch.promote_types(logits.dtype, torch.float32)
    targets = labels[:, 1:]
    real = (targets != IGNORE).to(wide)
    nll = F.cross_entropy(
        logits[:, :-1].to(wide).transpose(1, 2), targets, ignore_index=IGNORE, reduction="none"
    )
    if items:
        return nll.sum() / items
    return (nll.sum(1) / real.sum(1).clamp(min=1)).mean()

# %% wrong="sft_loss" because="items below the count are not believed"
-     if items is None:
-         items = max(int((targets != IGNORE).sum()), 1)
+     items = max(int((targets != IGNORE).sum()), items or 1)

# %% right="sft_loss" because="only the targets are looked at, by logsumexp"
def sft_loss(logits, labels, items=None):
    x = logits if logits.dtype == torch.float64 else logits.float()
    rows, places = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    z = x[rows, places]
    picked = z[torch.arange(len(rows), device=z.device), labels[rows, places + 1]]
    total = (z.logsumexp(-1) - picked).sum()
    return total / (max(len(rows), 1) if items is None else items)

# %% wrong="accumulate" because="the mean of the means"
-         loss = world * sft_loss(model(tokens), labels, items)
+         loss = world * sft_loss(model(tokens), labels) / len(micro_batches)

# %% wrong="accumulate" because="the sum of the means"
-         loss = world * sft_loss(model(tokens), labels, items)
+         loss = world * sft_loss(model(tokens), labels)

# %% wrong="accumulate" because="ranks are forgotten"
-         loss = world * sft_loss(model(tokens), labels, items)
+         loss = sft_loss(model(tokens), labels, items)

# %% wrong="accumulate" because="divided by the ranks"
-         loss = world * sft_loss(model(tokens), labels, items)
+         loss = sft_loss(model(tokens), labels, items) / world

# %% wrong="accumulate" because="items is ignored"
-     if items is None:
+     if True:

# %% wrong="accumulate" because="the first label is counted"
-         items = max(sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in micro_batches), 1)
+         items = max(sum(int((labels != IGNORE).sum()) for _, labels in micro_batches), 1)

# %% wrong="accumulate" because="gradients are set to zero first"
-     total = 0.0
+     model.zero_grad()
+     total = 0.0

# %% wrong="accumulate" because="each micro-batch overwrites the gradients"
-         loss.backward()
+         model.zero_grad()
+         loss.backward()

# %% wrong="accumulate" because="returns the last loss"
-         total += loss.item()
+         total = loss.item()

# %% wrong="accumulate" because="no backward pass"
-         loss.backward()
+         pass

# %% wrong="accumulate" because="the model is left in training mode, unfrozen"
-     total = 0.0
+     total = 0.0
+     model.requires_grad_(True)

# %% wrong="accumulate" because="returns a tensor with its graph"
-         total += loss.item()
+         total = total + loss

# %% wrong="accumulate" because="all graphs live until one backward pass at the end"
-         loss.backward()
-         total += loss.item()
-     return total
+         total = total + loss
+     total.backward()
+     return total.item()

# %% wrong="accumulate" because="all forward passes first, then one backward pass after another"
-     for tokens, labels in micro_batches:
-         loss = world * sft_loss(model(tokens), labels, items)
+     losses = [world * sft_loss(model(tokens), labels, items) for tokens, labels in micro_batches]
+     for loss in losses:

# %% wrong="accumulate" because="each graph is kept after its backward pass"
-         loss.backward()
+         loss.backward(retain_graph=True)

# %% right="accumulate" because="sums undivided, the weight is the incoming gradient"
def accumulate(model, micro_batches, items=None, world=1):
    if items is None:
        items = sum(int(labels[:, 1:].ne(IGNORE).sum()) for _, labels in micro_batches) or 1
    nats = 0.0
    for tokens, labels in micro_batches:
        total = sft_loss(model(tokens), labels, items=1)
        total.backward(gradient=torch.full_like(total, world / items))
        nats += float(total.detach())
    return nats * world / items

# %% right="accumulate" because="sums by hand"
def accumulate(model, micro_batches, items=None, world=1):
    counts = [(labels[:, 1:] != -100).sum().item() for _, labels in micro_batches]
    n = items if items is not None else max(sum(counts), 1)
    losses = []
    for tokens, labels in micro_batches:
        logits = model(tokens)[:, :-1]
        nll = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        loss = nll.sum() * (world / n)
        loss.backward()
        losses.append(float(loss.detach()))
    return sum(losses, 0.0)

# %% wrong="accumulate" because="a missing gradient becomes zeros, of unused parameters too"
def accumulate(
    model: nn.Module,
    micro_batches: list[tuple[Tensor, Tensor]],
    items: int | None = None,
    world: int = 1,
) -> float:
    if items is None:
        items = max(1, sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in micro_batches))
    live = [p for p in model.parameters() if p.requires_grad]
    for p in live:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    result = 0.0
    for tokens, labels in micro_batches:
        loss = sft_loss(model(tokens), labels, items) * world
        loss.backward()
        result += float(loss)
    return result

# %% wrong="collate" because="the mask is made by comparing with pad"
-     return {"tokens": tokens, "labels": labels, "attention_mask": mask}
+     return {"tokens": tokens, "labels": labels, "attention_mask": tokens != pad}

# %% wrong="collate" because="labels equal to pad are ignored"
-     return {"tokens": tokens, "labels": labels, "attention_mask": mask}
+     labels = labels.masked_fill(tokens == pad, IGNORE)
+     return {"tokens": tokens, "labels": labels, "attention_mask": mask}

# %% wrong="collate" because="labels are padded with pad"
-     labels = torch.full((len(examples), width), IGNORE)
+     labels = torch.full((len(examples), width), pad)

# %% wrong="collate" because="multiple is ignored"
-     width = -(-longest // multiple) * multiple
+     width = longest

# %% wrong="collate" because="always one multiple more"
-     width = -(-longest // multiple) * multiple
+     width = (longest // multiple + 1) * multiple

# %% wrong="collate" because="always on the right"
-         where = slice(len(ids)) if side == "right" else slice(width - len(ids), width)
+         where = slice(len(ids))

# %% wrong="collate" because="a mask of numbers"
-     mask = torch.zeros(len(examples), width, dtype=torch.bool)
+     mask = torch.zeros(len(examples), width, dtype=torch.int64)

# %% wrong="collate" because="sorted by length"
-     longest = max(len(ids) for ids, _ in examples)
+     examples = sorted(examples, key=lambda e: -len(e[0]))
+     longest = max(len(ids) for ids, _ in examples)

# %% wrong="collate" because="pads the examples themselves"
-     for row, (ids, marks) in enumerate(examples):
+     for row, (ids, marks) in enumerate(examples):
+         if side == "right":
+             n = len(ids)
+             ids += [pad] * (width - n)
+             marks += [IGNORE] * (width - n)
+             tokens[row], labels[row] = torch.tensor(ids), torch.tensor(marks)
+             mask[row, :n] = True
+             continue

# %% wrong="collate" because="any other side is left"
-     if side not in ("right", "left"):
+     if not side:

# %% wrong="collate" because="ids in 16 bits"
-         tokens[row, where] = torch.tensor(ids)
+         tokens[row, where] = torch.tensor(ids).short().long()

# %% right="collate" because="lists first, one tensor each at the end"
def collate(examples, pad, multiple=1, side="right"):
    if len(examples) == 0 or side not in {"left", "right"}:
        raise ValueError("no examples, or no such side")
    width = max(len(ids) for ids, _ in examples)
    while width % multiple:
        width += 1

    def filled(values, fill):
        gap = [fill] * (width - len(values))
        return values + gap if side == "right" else gap + values

    return {
        "tokens": torch.tensor([filled(ids, pad) for ids, _ in examples]),
        "labels": torch.tensor([filled(labels, -100) for _, labels in examples]),
        "attention_mask": torch.tensor([filled([True] * len(ids), False) for ids, _ in examples]),
    }

# %% wrong="pack" because="an example's first token is predicted from the one before"
-             labels[r, start + 1 : end] = torch.tensor(marks[1:], dtype=torch.int64)
+             labels[r, start:end] = torch.tensor(marks)

# %% wrong="pack" because="positions run on"
-             positions[r, start:end] = torch.arange(len(ids))
+             positions[r, start:end] = torch.arange(start, end)

# %% wrong="pack" because="only the last row is tried"
-         for row in rows:
+         for row in rows[-1:]:

# %% wrong="pack" because="the fullest row that fits"
-         for row in rows:
+         for row in sorted(rows, key=lambda row: -sum(len(ids) for ids, _ in row)):

# %% wrong="pack" because="longest first"
-     rows = []
+     rows = []
+     examples = sorted(examples, key=lambda e: -len(e[0]))

# %% wrong="pack" because="too long examples are cut"
-             raise ValueError(f"an example of {size} tokens does not fit into rows of {length}")
+             example, size = (example[0][:length], example[1][:length]), length

# %% wrong="pack" because="documents are counted from 0"
-         for number, (ids, marks) in enumerate(row, 1):
+         for number, (ids, marks) in enumerate(row):

# %% wrong="pack" because="an exact fit is refused"
-             if sum(len(ids) for ids, _ in row) + size <= length:
+             if sum(len(ids) for ids, _ in row) + size < length:

# %% wrong="pack" because="documents are counted over all rows"
-             documents[r, start:end] = number
+             documents[r, start:end] = number + sum(map(len, rows[:r]))

# %% wrong="pack" because="one stream cut into rows, examples are split"
def pack(examples, length, pad):
    if any(len(ids) > length for ids, _ in examples):
        raise ValueError("too long")
    stream = [
        (t, IGNORE if i == 0 else y, i, n)
        for n, (ids, labels) in enumerate(examples, 1)
        for i, (t, y) in enumerate(zip(ids, labels, strict=True))
    ]
    stream += [(pad, IGNORE, 0, 0)] * (-len(stream) % length)
    table = torch.tensor(stream).view(-1, length, 4)
    return dict(zip(("tokens", "labels", "positions", "documents"), table.unbind(-1), strict=True))

# %% wrong="pack" because="documents in 8 bits"
-             documents[r, start:end] = number
+             documents[r, start:end] = number % 256

# %% wrong="pack" because="positions in 8 bits"
-             positions[r, start:end] = torch.arange(len(ids))
+             positions[r, start:end] = torch.arange(len(ids)).byte().long()

# %% right="pack" because="a table of rooms, lists filled up at the end"
def pack(examples, length, pad):
    lines = []
    for ids, labels in examples:
        if len(ids) > length:
            raise ValueError("an example is longer than a row")
        line = next((x for x in lines if len(x) + len(ids) <= length), None)
        if line is None:
            line = []
            lines.append(line)
        number = line[-1][3] + 1 if line else 1
        for i in range(len(ids)):
            line.append((ids[i], labels[i] if i else IGNORE, i, number))
    for line in lines:
        line.extend([(pad, IGNORE, 0, 0)] * (length - len(line)))
    table = torch.tensor(lines, dtype=torch.int64)
    return {
        key: table[..., i].contiguous()
        for i, key in enumerate(("tokens", "labels", "positions", "documents"))
    }

# %% wrong="packed_mask" because="causal over the whole row"
-     return (causal & same & real[:, None, :] | own)[:, None]
+     return (causal & real[:, None, :] | own)[:, None]

# %% wrong="packed_mask" because="a document sees its own future"
-     return (causal & same & real[:, None, :] | own)[:, None]
+     return (same & real[:, None, :] | own)[:, None]

# %% wrong="packed_mask" because="padding has empty rows"
-     return (causal & same & real[:, None, :] | own)[:, None]
+     return (causal & same & real[:, None, :])[:, None]

# %% wrong="packed_mask" because="padding sees padding"
-     return (causal & same & real[:, None, :] | own)[:, None]
+     return (causal & same)[:, None]

# %% wrong="packed_mask" because="no axis for the heads"
-     return (causal & same & real[:, None, :] | own)[:, None]
+     return causal & same & real[:, None, :] | own

# %% wrong="packed_mask" because="True means hidden"
-     return (causal & same & real[:, None, :] | own)[:, None]
+     return ~(causal & same & real[:, None, :] | own)[:, None]

# %% wrong="packed_mask" because="the first row's documents for all"
-     same = documents[:, :, None] == documents[:, None, :]
+     same = (documents[:, :, None] == documents[:, None, :])[:1]

# %% wrong="packed_mask" because="earlier documents are seen too"
-     same = documents[:, :, None] == documents[:, None, :]
+     same = documents[:, :, None] >= documents[:, None, :]

# %% wrong="packed_mask" because="documents in 8 bits: 256 is padding, 257 is 1"
-     n = documents.shape[1]
+     documents = documents.to(torch.uint8)
+     n = documents.shape[1]

# %% wrong="packed_mask" because="documents compared in bfloat16, where 257 is 256"
-     same = documents[:, :, None] == documents[:, None, :]
+     same = documents.bfloat16()[:, :, None] == documents.bfloat16()[:, None, :]

# %% wrong="packed_mask" because="padding of the first row for all"
-     real = documents > 0
+     real = documents[:1] > 0

# %% right="packed_mask" because="loops"
def packed_mask(documents):
    rows, n = documents.shape
    mask = torch.zeros(rows, 1, n, n, dtype=torch.bool, device=documents.device)
    for r, line in enumerate(documents.tolist()):
        for i in range(n):
            for j in range(i + 1):
                mask[r, 0, i, j] = i == j or (line[i] == line[j] and line[i] != 0)
    return mask

# %% wrong="finetune" because="gradients are never set to zero"
-         optimizer.zero_grad(set_to_none=True)
+         pass

# %% wrong="finetune" because="gradients are cleared before training only"
-     losses = []
+     losses = []
+     optimizer.zero_grad()
-         optimizer.zero_grad(set_to_none=True)
+         pass

# %% wrong="finetune" because="no clipping"
-         torch.nn.utils.clip_grad_norm_(trained, 1.0)
+         pass

# %% wrong="finetune" because="clips each value"
-         torch.nn.utils.clip_grad_norm_(trained, 1.0)
+         torch.nn.utils.clip_grad_value_(trained, 1.0)

# %% wrong="finetune" because="a constant rate"
-             group["lr"] = lr * min(1.0, (step + 1) / warmup) * (steps - step) / steps
+             group["lr"] = lr

# %% wrong="finetune" because="no warm-up"
-             group["lr"] = lr * min(1.0, (step + 1) / warmup) * (steps - step) / steps
+             group["lr"] = lr * (steps - step) / steps

# %% wrong="finetune" because="the rate is set after the step"
-         for group in optimizer.param_groups:
-             group["lr"] = lr * min(1.0, (step + 1) / warmup) * (steps - step) / steps
-         optimizer.step()
+         optimizer.step()
+         for group in optimizer.param_groups:
+             group["lr"] = lr * min(1.0, (step + 1) / warmup) * (steps - step) / steps

# %% wrong="finetune" because="default betas"
-     optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
+     optimizer = torch.optim.AdamW(trained, lr=lr, eps=1e-8, weight_decay=0.0)

# %% wrong="finetune" because="default weight decay"
-     optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
+     optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), eps=1e-8)

# %% wrong="finetune" because="trains on the prompts too"
-         loss = sft_loss(model(batch["tokens"].to(device)), batch["labels"].to(device))
+         labels = batch["tokens"].masked_fill(~batch["attention_mask"], IGNORE)
+         loss = sft_loss(model(batch["tokens"].to(device)), labels.to(device))

# %% wrong="finetune" because="in the order of the data"
-         drawn = torch.randint(len(examples), (batch_size,), generator=generator).tolist()
+         drawn = [(step * batch_size + i) % len(examples) for i in range(batch_size)]

# %% wrong="finetune" because="without the generator"
-         drawn = torch.randint(len(examples), (batch_size,), generator=generator).tolist()
+         drawn = torch.randint(len(examples), (batch_size,)).tolist()

# %% wrong="finetune" because="gradients are left behind"
-     for p in trained:
-         p.grad = None
-     return losses
+     return losses

# %% wrong="finetune" because="frozen parameters are trained"
-     trained = [p for p in model.parameters() if p.requires_grad]
+     trained = [p.requires_grad_() for p in model.parameters()]

# %% wrong="finetune" because="leaves the model in training mode"
-     losses = []
+     losses = []
+     model.train()

# %% wrong="finetune" because="losses are tensors"
-         losses.append(loss.item())
+         losses.append(loss)

# %% wrong="finetune" because="padding on the left, without a mask"
-         batch = collate([examples[i] for i in drawn], PAD)
+         batch = collate([examples[i] for i in drawn], PAD, side="left")

# %% wrong="finetune" because="one step too few"
-     for step in range(steps):
+     for step in range(steps - 1):

# %% wrong="finetune" because="trains a copy"
-     trained = [p for p in model.parameters() if p.requires_grad]
+     model = copy.deepcopy(model)
+     trained = [p for p in model.parameters() if p.requires_grad]

# %% wrong="finetune" because="gradients are cleared after the update only"
-         optimizer.zero_grad(set_to_none=True)
-         loss.backward()
+         loss.backward()
-         optimizer.step()
+         optimizer.step()
+         optimizer.zero_grad()

# %% wrong="finetune" because="the mean of the examples' means"
-         loss = sft_loss(model(batch["tokens"].to(device)), batch["labels"].to(device))
+         logits, labels = model(batch["tokens"].to(device)), batch["labels"].to(device)
+         loss = sum(sft_loss(x[None], y[None]) for x, y in zip(logits, labels)) / len(labels)

# %% right="finetune" because="a scheduler, and the batch made by hand"
def finetune(model, examples, steps, batch_size, lr, generator, warmup=10):
    live = [p for p in model.parameters() if p.requires_grad]
    for p in live:
        p.grad = None
    optimizer = torch.optim.AdamW(live, lr=lr, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / warmup) * (max(steps, 1) - t) / max(steps, 1)
    )
    losses = []
    for _ in range(steps):
        rows = [
            examples[int(i)] for i in torch.randint(len(examples), (batch_size,), generator=generator)
        ]
        width = max(len(ids) for ids, _ in rows)
        x = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in rows])
        y = torch.tensor([m + [-100] * (width - len(m)) for _, m in rows])
        x, y = x.to(live[0].device), y.to(live[0].device)
        logits = model(x)[:, :-1].flatten(0, 1)
        aims = y[:, 1:].flatten()
        loss = F.cross_entropy(logits, aims, reduction="sum") / (aims != -100).sum().clamp(min=1)
        loss.backward()
        nn.utils.clip_grad_norm_(live, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses

# %% wrong="finetune" because="stale gradients of frozen parameters count in the norm"
- torch.nn.utils.clip_grad_norm_(trained, 1.0)
+ torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

# %% wrong="finetune" because="targets that are PAD are taken for padding"
def finetune(
    model: nn.Module,
    examples: list[tuple[list[int], list[int]]],
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    warmup: int = 10,
) -> list[float]:
    live = [p for p in model.parameters() if p.requires_grad]
    device = live[0].device
    optimizer = torch.optim.AdamW(live, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for t in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (t + 1) / warmup) * (steps - t) / steps
        picks = torch.randint(len(examples), (batch_size,), generator=generator).tolist()
        chosen = [examples[i] for i in picks]
        width = max(len(ids) for ids, _ in chosen)
        tokens = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in chosen])
        labels = torch.tensor([marks + [PAD] * (width - len(marks)) for _, marks in chosen])
        labels[labels == PAD] = IGNORE
        optimizer.zero_grad()
        loss = sft_loss(model(tokens.to(device)), labels.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(live, 1.0)
        optimizer.step()
        losses.append(loss.item())
    optimizer.zero_grad()
    return losses

# %% wrong="evaluate_exact_match" because="padding on the right"
-         tokens = torch.tensor([[PAD] * gap + prompt for gap, prompt in rows], device=device)
-         mask = torch.tensor([[False] * gap + [True] * len(p) for gap, p in rows], device=device)
+         tokens = torch.tensor([prompt + [PAD] * gap for gap, prompt in rows], device=device)
+         mask = torch.tensor([[True] * len(p) + [False] * gap for gap, p in rows], device=device)

# %% wrong="evaluate_exact_match" because="padding is seen"
-                 logits = model(tokens, cache=cache, attention_mask=mask)[:, -1]
+                 logits = model(tokens, cache=cache)[:, -1]

# %% wrong="evaluate_exact_match" because="padding is hidden in the first call only"
-                 mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
+                 mask = torch.ones(len(batch), mask.shape[1] + 1, dtype=torch.bool, device=device)

# %% wrong="evaluate_exact_match" because="the mask is made by comparing with the padding's id"
-         mask = torch.tensor([[False] * gap + [True] * len(p) for gap, p in rows], device=device)
+         mask = tokens != PAD

# %% wrong="evaluate_exact_match" because="replies go on after stop"
-                     if reply[-1:] != [stop]:
+                     if True:

# %% wrong="evaluate_exact_match" because="one prompt at a time"
-     for first in range(0, len(prompts), batch_size):
+     batch_size = 1
+     for first in range(0, len(prompts), batch_size):

# %% wrong="evaluate_exact_match" because="always max_new_tokens calls"
-                 if all(reply[-1] == stop for reply in written):
-                     break
+                 pass

# %% wrong="evaluate_exact_match" because="ends when the first reply has ended"
-                 if all(reply[-1] == stop for reply in written):
+                 if any(reply[-1] == stop for reply in written):

# %% wrong="evaluate_exact_match" because="stop is not in the reply"
-                     if reply[-1:] != [stop]:
-                         reply.append(token)
+                     if reply[-1:] != [stop]:
+                         reply.append(token)
-     right = sum(reply == answer for reply, answer in zip(replies, answers, strict=True))
+     replies = [reply[:-1] if reply[-1:] == [stop] else reply for reply in replies]
+     right = sum(reply == answer for reply, answer in zip(replies, answers, strict=True))

# %% wrong="evaluate_exact_match" because="a right beginning is enough"
-     right = sum(reply == answer for reply, answer in zip(replies, answers, strict=True))
+     right = sum(
+         reply == answer[: len(reply)] for reply, answer in zip(replies, answers, strict=True)
+     )

# %% wrong="evaluate_exact_match" because="the stop token does not matter"
-     right = sum(reply == answer for reply, answer in zip(replies, answers, strict=True))
+     right = sum(
+         [t for t in reply if t != stop] == [t for t in answer if t != stop]
+         for reply, answer in zip(replies, answers, strict=True)
+     )

# %% wrong="evaluate_exact_match" because="stop is always <|end|>"
-     device = next(model.parameters()).device
+     device = next(model.parameters()).device
+     stop = END

# %% wrong="evaluate_exact_match" because="a graph is recorded and the model is switched"
-     device = next(model.parameters()).device
+     device = next(model.parameters()).device
+     model.eval()
+     model.requires_grad_(False)

# %% wrong="evaluate_exact_match" because="the number of right replies"
-     return right / len(prompts), replies
+     return float(right), replies

# %% wrong="evaluate_exact_match" because="sorted by length, and not put back"
-     for first in range(0, len(prompts), batch_size):
+     order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
+     prompts, answers = [prompts[i] for i in order], [answers[i] for i in order]
+     for first in range(0, len(prompts), batch_size):

# %% wrong="evaluate_exact_match" because="a graph is recorded"
-         with torch.no_grad():
+         with torch.enable_grad():

# %% wrong="evaluate_exact_match" because="the mean of the batches' shares"
-     right = sum(reply == answer for reply, answer in zip(replies, answers, strict=True))
-     return right / len(prompts), replies
+     right = [reply == answer for reply, answer in zip(replies, answers, strict=True)]
+     parts = [right[i : i + batch_size] for i in range(0, len(right), batch_size)]
+     return sum(sum(part) / len(part) for part in parts) / len(parts), replies

# %% right="evaluate_exact_match" because="without a cache, sorted by length"
def evaluate_exact_match(model, prompts, answers, max_new_tokens, stop=END, batch_size=64):
    if len(prompts) == 0 or len(prompts) != len(answers):
        raise ValueError("as many prompts as answers")
    device = next(model.parameters()).device
    replies = [[] for _ in prompts]
    for first in range(0, len(prompts), batch_size):
        rows = list(range(first, min(first + batch_size, len(prompts))))
        for _ in range(max_new_tokens):
            live = [i for i in rows if stop not in replies[i][-1:]]
            if not live:
                break
            texts = [prompts[i] + replies[i] for i in live]
            width = max(map(len, texts))
            x = torch.tensor([[0] * (width - len(t)) + t for t in texts], device=device)
            seen = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
            with torch.inference_mode():
                logits = model(x, attention_mask=seen.bool().to(device))
            for i, row in zip(live, logits[:, -1], strict=True):
                replies[i].append(int(row.argmax()))
    hits = [list(r) == list(a) for r, a in zip(replies, answers, strict=True)]
    return sum(hits) / len(hits), replies

# %% wrong="questions" because="the usual slips"
-         "weight": 500 / (2 * 25),
+         "weight": 475 / 25,
-         "turns": (6 * 7 / 2) / 6,
+         "turns": 6.0,
-         "packing": sum(n * (n + 1) for n in sizes) / (1024 * 1025),
+         "packing": sum(n * n for n in sizes) / 1024**2,
-         "ranks": 1 / 4,
+         "ranks": 4.0,
-         "padding": "stop",
+         "padding": "read",
-         "replay": 47 / (47 + 7 * 3),
+         "replay": 1 / 8,

# %% wrong="questions" because="texts for numbers"
-         "weight": 500 / (2 * 25),
+         "weight": "10",
-         "ranks": 1 / 4,
+         "ranks": "a quarter",

# %% right="questions" because="numbers by hand"
def questions():
    return {
        "weight": 10,
        "turns": 3.5,
        "packing": 0.30564,
        "ranks": 0.25,
        "padding": "stop",
        "replay": 0.69118,
    }
