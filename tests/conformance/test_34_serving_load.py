"""Two hundred requests at once on lesson 34's endpoint, over HTTP: good ones, impatient ones and nonsense.

Everything comes from the lesson's reference answers. What must hold: good answers are those of one request at a time
(where no two tokens nearly tie), whoever hangs up is no longer written for, nonsense is a 4xx that says why, and in
the end no block, thread or port is left.
"""

import asyncio
import json
import random
import socket
import threading
import time
from collections import Counter

import httpx
import torch

from llm40 import data, models

GOOD, IMPATIENT, NONSENSE = 140, 30, 30
MARGIN = 1e-3  # between the two largest logits: below it, another order of summation may choose otherwise
COUNT, SIZE = 90, 8  # blocks and tokens in one: too few for all who run, so that some are preempted
NONSENSICAL = [
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": "many"}, 400, "max_tokens"),
    ({"max_tokens": COUNT * SIZE}, 400, "messages"),
    ({"temperature": -1}, 400, "temperature"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 7}]}, 400, "messages.0.content"),
    ({"top_k": 3}, 400, "top_k"),
    ({"model": "larger"}, 404, "model"),
    (b'{"model": "tiny", "messages"', 400, None),
    (b"\xff\xfe", 400, None),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\udc00"}]}', 400, "messages.0.content"),
]


def make_requests(seed: int) -> list[dict]:
    """Bodies of unequal lengths, in random order; some begin alike."""
    draw, pages = random.Random(seed), list(data.documentation().values())
    made = []
    for n in range(GOOD + IMPATIENT):
        page = draw.choice(pages[:5] if n % 3 else pages)
        start = 0 if n % 3 else draw.randrange(max(1, len(page) - 400))
        content = page[start : start + draw.choice((1, 20, 60, 150, 300))]
        kind = "good" if n < GOOD else "impatient"
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": draw.choice((1, 3, 8, 20, 45)) if kind == "good" else 400, "stream": n % 2 == 0}
        made.append({"kind": kind, "body": body | ({"stream": True} if kind == "impatient" else {})})
    for n in range(NONSENSE):
        fields, status, param = NONSENSICAL[n % len(NONSENSICAL)]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "def f("}], "stream": n % 2 == 0}
        body = fields if isinstance(fields, bytes) else body | fields
        made.append({"kind": "nonsense", "body": body, "status": status, "param": param})
    draw.shuffle(made)
    return made


async def send_all(address: str, requests: list[dict]) -> None:
    """Sends all requests at once; what came back is noted in them."""
    limits = httpx.Limits(max_connections=len(requests))
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        await asyncio.gather(*(send(client, request, n) for n, request in enumerate(requests)))


async def send(client: httpx.AsyncClient, request: dict, number: int) -> None:
    body, path = request["body"], "/v1/chat/completions"
    await asyncio.sleep(0.004 * number)
    if isinstance(body, bytes) or not body.get("stream"):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await client.post(path, content=raw, headers={"Content-Type": "application/json"})
        request["got"], request["answer"] = response.status_code, response.json()
        return
    pieces, patience = [], number % 5  # events that an impatient client waits for
    async with client.stream("POST", path, json=body) as response:
        request["got"] = response.status_code
        if response.status_code != 200:
            request["answer"] = json.loads(await response.aread())
            return
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                pieces.append(choice["delta"].get("content", ""))
                request["reason"] = choice["finish_reason"]
            if request["kind"] == "impatient" and len(pieces) > patience:
                return  # leaving the block closes the connection
        request["done"] = line == "" or line == "data: [DONE]"
    request["text"] = "".join(pieces)


def one_at_a_time(model, tokenizer, body: dict) -> tuple[str, str, float]:
    """Greedy text, its reason, and the smallest distance between the two largest logits on the way."""
    ids = [tokenizer.eos, *tokenizer.encode(body["messages"][0]["content"])]
    (tokens,) = models.generate(model, [ids], body["max_tokens"], stop=tokenizer.eos)
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *tokens]]))[0, len(ids) - 1 : -1]
    first, second = logits.topk(2).values.unbind(-1)
    ended = tokens[-1] == tokenizer.eos
    text = tokenizer.decode(tokens[:-1] if ended else tokens)
    return text, "stop" if ended else "length", float((first - second).min())


def test_two_hundred_requests(reference):
    lesson, began = reference("34"), time.process_time()
    model, tokenizer = models.load("tiny", device="cpu")
    blocks = lesson.Blocks(COUNT, SIZE, lesson.RadixCache())
    engine = lesson.Engine(model, lesson.Scheduler(blocks, 64, 16))
    written, threads, step = Counter(), set(threading.enumerate()), engine.step

    def counted_step():
        events = step()
        written.update(number for number, *_ in events)
        return events

    engine.step = counted_step
    requests = make_requests(seed=0)
    assert len(requests) == 200
    with lesson.serving(lesson.make_app(engine, lesson.Texts(tokenizer), "tiny")) as address:
        asyncio.run(send_all(address, requests))
        end = time.monotonic() + 10
        while engine.busy and time.monotonic() < end:
            time.sleep(0.01)
        assert not engine.busy, "somebody is still written for"

    # Good answers are those of one request at a time.
    compared = 0
    for request in (r for r in requests if r["kind"] == "good"):
        assert request["got"] == 200, request
        if request["body"]["stream"]:
            assert request["done"], "a stream without an end"
            text, reason = request["text"], request["reason"]
        else:
            (choice,) = request["answer"]["choices"]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        expected, why, margin = one_at_a_time(model, tokenizer, request["body"])
        if margin > MARGIN:
            compared += 1
            assert (text, reason) == (expected, why)
    assert compared > 0.8 * GOOD

    # Nonsense is refused, and said to be.
    for request in (r for r in requests if r["kind"] == "nonsense"):
        assert request["got"] == request["status"], request
        error = request["answer"]["error"]
        assert error["param"] == request["param"], request
        assert len(error["message"]) > 10, request

    # Nobody is written for who has gone; all that was submitted were the good and the impatient.
    assert len(written) <= GOOD + IMPATIENT
    assert max(written.values()) < 400, "an impatient client's request was written to its end"
    assert engine.scheduler.preemptions > 0, "memory sufficed for all: the test shows less than it should"

    # Nothing is left.
    assert blocks.available == COUNT
    assert len(blocks.free) + len(blocks.cached) == COUNT
    assert len(blocks.prefixes) == len(blocks.cached)
    assert set(threading.enumerate()) <= threads
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) != 0
    assert time.process_time() - began < 60
