"""Lesson 30 against PyTorch's SDPA and its paged flex attention, and transformers' cache, Llama and block allocator."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from llm40 import models

transformers = pytest.importorskip("transformers")
flex = pytest.importorskip("torch.nn.attention.flex_attention")
paged = pytest.importorskip("torch.nn.attention.experimental._paged_attention")


@pytest.fixture
def lesson(reference):
    return reference("30")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(lesson, lengths, size, kv_heads, width, seed, dtype=torch.float64):
    """A cache of one layer with sequences of these lengths, written in turns, and their keys and values."""
    g = generator(seed)
    cache = lesson.PagedKVCache(1, kv_heads, width, sum(-(-n // size) for n in lengths) + 2, size, dtype=dtype)
    cache.k.fill_(math.nan), cache.v.fill_(math.nan)
    cache.allocator.free(cache.allocator.allocate(1))  # blocks are not in order
    sequences = [cache.add() for _ in lengths]
    texts = [torch.randn(2, n, kv_heads, width, generator=g, dtype=torch.float64) for n in lengths]
    done = [0] * len(lengths)
    while done != list(lengths):
        for i, sequence in enumerate(sequences):
            count = min(3 + i, lengths[i] - done[i])
            slots = cache.reserve(sequence, count)
            cache.write(0, slots, *texts[i][:, done[i] : done[i] + count])
            done[i] += count
    return cache, sequences, texts


def rectangle(cache, sequences):
    """Tables (batch, blocks) int32, -1 behind the end, and lengths."""
    rows = [cache.tables[s] for s in sequences]
    longest = max(1, *map(len, rows))
    tables = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.int32)
    return tables, torch.tensor([cache.lengths[s] for s in sequences], dtype=torch.int32)


def dense(q, text, causal_from=None):
    """SDPA of queries (n, heads, width) over one sequence; query i sees causal_from + i + 1 keys, all by default."""
    k, v = (t.transpose(0, 1)[None] for t in text)
    mask = None
    if causal_from is not None:
        mask = torch.arange(k.shape[2]) <= torch.arange(causal_from, causal_from + len(q))[:, None]
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


SHAPES = [([5, 17, 1, 8], 4, 4, 2, 6), ([33, 2], 16, 6, 1, 8), ([7, 7, 7], 7, 3, 3, 5)]


@pytest.mark.parametrize(("lengths", "size", "heads", "kv_heads", "width"), SHAPES)
def test_attention(lesson, agrees, lengths, size, heads, kv_heads, width):
    """Decode and packed prefill, in float64, each sequence dense by itself."""
    cache, sequences, texts = filled(lesson, lengths, size, kv_heads, width, 1)
    tables, held = rectangle(cache, sequences)
    g = generator(2)
    q = torch.randn(len(lengths), heads, width, generator=g, dtype=torch.float64)
    right = torch.cat([dense(row[None], text) for row, text in zip(q, texts, strict=True)])
    found = lesson.paged_attention(q, cache.k[0], cache.v[0], tables, held)
    agrees("paged_attention", "PyTorch SDPA, float64", found, right, 1e-12)

    counts = torch.tensor([min(n, 1 + 2 * i) for i, n in enumerate(lengths)])
    q = torch.randn(int(counts.sum()), heads, width, generator=g, dtype=torch.float64)
    parts = zip(q.split(counts.tolist()), texts, lengths, strict=True)
    right = torch.cat([dense(part, text, n - len(part)) for part, text, n in parts])
    found = lesson.paged_prefill(q, cache.k[0], cache.v[0], tables, held, counts)
    agrees("paged_prefill", "PyTorch SDPA, float64", found, right, 1e-12)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("lengths", "size", "heads", "kv_heads", "width"), SHAPES)
def test_kernels(lesson, agrees, lengths, size, heads, kv_heads, width, splits):
    """Both kernels, in Triton's interpreter or on this GPU."""
    cache, sequences, texts = filled(lesson, lengths, size, kv_heads, width, 3, torch.float32)
    device = lesson.profile.device
    tables, held = (t.to(device) for t in rectangle(cache, sequences))
    q = torch.randn(len(lengths), heads, width, generator=generator(4))
    exact = [text.float().double() for text in texts]
    right = torch.cat([dense(row[None].double(), text) for row, text in zip(q, exact, strict=True)])
    found = lesson.paged_decode(q.to(device), cache.k[0].to(device), cache.v[0].to(device), tables, held, splits, 16)
    agrees("paged_decode: the kernels", "PyTorch SDPA, float64", found.cpu(), right, 1e-6)


@pytest.mark.parametrize(("size", "heads", "kv_heads", "width"), [(4, 4, 2, 8), (8, 3, 3, 16)])
def test_paged_flex_attention(lesson, agrees, size, heads, kv_heads, width):
    """PyTorch's own pages, filled with the same tokens: cache and attention, one query a sequence."""
    lengths = [5, 17, 1, 8]
    cache, sequences, texts = filled(lesson, lengths, size, kv_heads, width, 5, torch.float32)
    pages = paged.PagedAttention(16, size, len(lengths), device="cpu")
    k, v = (torch.zeros(1, kv_heads, 16 * size, width) for _ in range(2))
    for row, (n, text) in enumerate(zip(lengths, texts, strict=True)):
        index = torch.tensor([row])
        pages.reserve(index[0], torch.tensor(n))
        values = (t.float().transpose(0, 1)[None] for t in text)
        pages.assign(index, torch.arange(n)[None], *values, k, v)
    q = torch.randn(len(lengths), heads, width, generator=generator(6))
    most = -(-max(lengths) // size) * size
    lens = torch.tensor(lengths)
    mask = flex.create_block_mask(
        lambda b, h, i, j: j < lens[b], len(lengths), None, 1, most, device="cpu", BLOCK_SIZE=size
    )
    mask = pages.convert_logical_block_mask(mask, kv_len=lens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uncompiled, as is right here
        right = flex.flex_attention(q[:, :, None], k, v, block_mask=mask, enable_gqa=True)[:, :, 0]
    found = lesson.paged_attention(q, cache.k[0], cache.v[0], *rectangle(cache, sequences))
    agrees("paged_attention", "PyTorch PagedAttention with flex attention", found, right, 1e-5)


def allocator(num_blocks: int, size: int, kv_heads: int, width: int):
    """transformers' allocator of blocks for one full-attention layer, with its cache tensor; a sector is a block."""
    from transformers.generation.continuous_batching import cache_allocators
    from transformers.generation.continuous_batching.cache_allocators import cache_pool

    config = transformers.LlamaConfig(
        hidden_size=kv_heads * width, num_attention_heads=kv_heads, num_key_value_heads=kv_heads, head_dim=width
    )
    made = cache_allocators.FullAttentionCacheAllocator(0, config, kv_heads, torch.float32, size, [0], True)
    pool = cache_pool.CachePool(num_blocks, 1)
    room = made.bytes_per_block * num_blocks
    memory = torch.zeros(room + 2 * made.bytes_per_block, dtype=torch.uint8)
    made.register_cache_tensor(made.bytes_per_block, room, memory, pool)
    for _ in range(num_blocks):
        pool.allocate_sector(0)
    return made


def test_block_allocator(lesson, agrees):
    """Tokens appended to sequences that fork, as transformers' allocator holds them, which copies when it forks."""
    try:
        theirs = allocator(64, 4, 2, 3)
    except (ImportError, AttributeError, TypeError) as error:
        pytest.skip(f"transformers' allocator is another one here: {error}")
    cache = lesson.PagedKVCache(1, 2, 3, 64, 4)
    g = generator(7)
    sequences = {cache.add(): "r0"}
    for turn in range(40):
        draw = int(torch.randint(0, 6, (1,), generator=g))
        mine = list(sequences)[int(torch.randint(0, len(sequences), (1,), generator=g))]
        name, past = sequences[mine], cache.lengths[mine]
        if draw == 0 and past and len(sequences) < 5:
            fork, copy = cache.fork(mine), f"r{turn + 1}"
            theirs.copy_blocks(*theirs.fork_blocks(name, copy, past))
            sequences[fork] = copy
        elif draw == 1 and len(sequences) > 1:
            cache.free(mine)
            theirs.free_blocks(name, no_cache=True)
            del sequences[mine]
        else:
            count = 1 + draw
            k, v = torch.randn(2, count, 2, 3, generator=g)
            cache.write(0, cache.reserve(mine, count), k, v)
            theirs.allocate_cache_to_request(name, past, count)
            where = torch.tensor(theirs.get_write_indices(name, past, count))
            theirs.update(k, v, 0, torch.tensor([], dtype=torch.long), where)
        for mine, name in sequences.items():
            if not cache.lengths[mine]:
                continue
            where = torch.tensor(theirs.get_read_indices(name, cache.lengths[mine], 0))
            right = [t.index_select(0, where) for t in theirs._kv_token_views[0]]
            places = torch.arange(cache.lengths[mine])
            blocks = torch.tensor(cache.tables[mine])[places // 4]
            for pool, expected in zip((cache.k[0], cache.v[0]), right, strict=True):
                agrees("PagedKVCache", "transformers block allocator", pool[blocks, :, places % 4], expected, 0)


def test_prefix_cache(lesson):
    """Random requests with common beginnings find as many blocks as transformers' allocator does."""
    try:
        theirs = allocator(400, 3, 1, 2)
    except (ImportError, AttributeError, TypeError) as error:
        pytest.skip(f"transformers' allocator is another one here: {error}")
    g = generator(8)
    pool = lesson.BlockAllocator(400)
    known, hits = lesson.PrefixCache(pool, 3), 0
    for turn in range(80):
        tokens = torch.randint(0, 2, (int(torch.randint(1, 14, (1,), generator=g)),), generator=g).tolist()
        found, right = known.match(tokens), theirs.match_prefix_blocks(tokens)
        assert len(found) == len(right), f"{tokens}: {len(found)} blocks are found, transformers finds {len(right)}"
        hits += len(found)
        table = found + pool.allocate(-(-len(tokens) // 3) - len(found))
        known.insert(tokens, table)
        name = f"r{turn}"
        theirs.acquire_prefix_blocks(name, len(right) * 3, right)
        theirs.allocate_cache_to_request(name, len(right) * 3, len(tokens) - len(right) * 3)
        theirs.mark_complete_blocks(name, tokens, len(tokens) // 3)
        if turn % 3:
            pool.free(table)
            theirs.free_blocks(name)
    assert hits > 40


@torch.no_grad()
def test_llama(lesson, agrees):
    """The model on pages, with chunks of unequal size, a fork and a move, against Hugging Face's Llama."""
    config = models.Config(vocab_size=50, hidden_size=32, layers=3, heads=4, kv_heads=2, mlp_size=48, context=64)
    mine = models.Llama(config).eval()
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=config.eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    g = generator(9)
    for parameter in mine.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.25)
    theirs.load_state_dict({f"model.{name}": t for name, t in mine.state_dict().items()}, strict=False)
    theirs.tie_weights()
    mine, theirs = mine.double(), theirs.double()
    a, b, tail = (torch.randint(0, 50, (n,), generator=g).tolist() for n in (11, 6, 5))
    cache = lesson.PagedKVCache(3, 2, 8, 30, 4, dtype=torch.float64)
    first, second = cache.add(), cache.add()
    steps = [{first: a[:7], second: b[:1]}, {second: b[1:], first: a[7:8]}, {first: a[8:]}]
    logits = [lesson.paged_step(mine, cache, step) for step in steps]
    rest = [logits[0][:7], logits[1][5:6], logits[2]]
    right_a, right_b = (theirs(torch.tensor([text])).logits[0] for text in (a, b))
    peer = "transformers Llama"
    agrees("paged_step", peer, torch.cat(rest), right_a, 1e-5)
    agrees("paged_step", peer, torch.cat([logits[0][7:], logits[1][:5]]), right_b, 1e-5)
    fork = cache.fork(first)
    other = lesson.paged_step(mine, cache, {fork: tail, first: b[:2]})
    agrees("paged_step after a fork", peer, other[:5], theirs(torch.tensor([a + tail])).logits[0, 11:], 1e-5)
    agrees("paged_step after a fork", peer, other[5:], theirs(torch.tensor([a + b[:2]])).logits[0, 11:], 1e-5)
    target = lesson.PagedKVCache(3, 2, 8, 30, 7, dtype=torch.float64)
    moved = lesson.migrate(fork, cache, target)
    last = lesson.paged_step(mine, target, {moved: b[:1]})
    agrees("paged_step after migrate", peer, last, theirs(torch.tensor([a + tail + b[:1]])).logits[0, -1:], 1e-5)
