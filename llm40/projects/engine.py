"""What an inference engine of a project must do, seen by a client: answer, stream, batch, refuse, and outlive clients.

The engine runs in a process of its own and is met over HTTP on this machine, by the client that people use (`openai`).
"""

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

PROVIDES = '''\
def serve(host, port):
    """Serves a model at http://host:port/v1 as OpenAI's API has it, until the process is stopped: GET /models, and POST
    /chat/completions with messages, max_tokens, temperature (0 is greedy) and stream."""
'''
STARTING = 120.0  # seconds
PROMPTS = [f"def add_{number}(a, b):\n    " + "# adds two numbers\n    " * (number % 7) for number in range(24)]
TOKENS = 12


def _serve(path: str, host: str, port: int) -> None:
    from llm40.projects import read_project

    read_project(Path(path)).serve(host, port)


@contextmanager
def _served(project: ModuleType) -> Iterator[object]:
    """A client of the engine, which runs inside the block."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(project.__file__, "127.0.0.1", port), daemon=True
    )
    process.start()
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        _wait(client, process)
        yield client
        assert process.is_alive(), "The server's process has ended."
    finally:
        process.terminate()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _wait(client: object, process: object) -> None:
    from openai import APIConnectionError

    end = time.monotonic() + STARTING
    while time.monotonic() < end:
        assert process.is_alive(), f"serve ended with exit code {process.exitcode} before it answered."
        try:
            client.models.list()
            return
        except APIConnectionError:
            time.sleep(0.2)
    raise AssertionError(f"GET /v1/models was not answered within {STARTING:.0f} seconds.")


def _ask(client: object, prompt: str, tokens: int = TOKENS, **more: object) -> object:
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        temperature=0,
        **more,
    )


def _write(client: object, prompt: str) -> str:
    return _ask(client, prompt).choices[0].message.content


def answers(project: ModuleType) -> str:
    """The client gets a completion, with its length and why it ended."""
    with _served(project) as client:
        given = _ask(client, PROMPTS[0])
    choice, usage = given.choices[0], given.usage
    assert choice.message.role == "assistant", f"The role is {choice.message.role!r}."
    assert choice.finish_reason in ("length", "stop"), f"finish_reason is {choice.finish_reason!r}."
    assert usage, "There is no usage."
    assert 1 <= usage.completion_tokens <= TOKENS, f"{TOKENS} tokens were allowed; usage is {usage}."
    assert choice.finish_reason == "stop" or usage.completion_tokens == TOKENS, (
        f"It ended by length after {usage.completion_tokens} of {TOKENS} tokens."
    )
    return f"{usage.completion_tokens} tokens, ended by {choice.finish_reason}."


def streams(project: ModuleType) -> str:
    """A stream comes piece by piece and says what the whole answer says."""
    with _served(project) as client:
        whole = _write(client, PROMPTS[1])
        chunks = [chunk.choices[0] for chunk in _ask(client, PROMPTS[1], stream=True) if chunk.choices]
    pieces = [choice.delta.content for choice in chunks if choice.delta.content]
    assert "".join(pieces) == whole, f"The stream says {''.join(pieces)!r}, the whole answer {whole!r}."
    assert len(pieces) > 1 or not whole, "All of it came in one piece."
    ends = [choice.finish_reason for choice in chunks if choice.finish_reason]
    assert ends == [chunks[-1].finish_reason], f"The pieces say finish_reason {ends}."
    return f"{len(pieces)} pieces."


def _at_once(asked: Callable[[str], str], prompts: list[str]) -> list[str]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(asked, prompts))


def batches_alike(project: ModuleType) -> str:
    """Twenty-four requests at once get the words that each gets alone."""
    with _served(project) as client:
        alone = [_write(client, prompt) for prompt in PROMPTS]
        together = _at_once(lambda prompt: _write(client, prompt), PROMPTS)
    other = [place for place, (a, b) in enumerate(zip(alone, together, strict=True)) if a != b]
    # Sums in another order may turn a token whose rival is as likely; one such in a class is no fault of the engine.
    assert len(other) <= 1, (
        f"{len(other)} differ; number {other[0]}: {together[other[0]]!r}, alone {alone[other[0]]!r}."
    )
    return f"{len(PROMPTS) - len(other)} of {len(PROMPTS)} are the same."


def refuses(project: ModuleType) -> str:
    """Bad requests are refused with a 4xx and a sentence, and the next good one is answered."""
    from openai import APIStatusError

    bad = {
        "no messages": {"messages": []},
        "a negative max_tokens": {"max_tokens": -1},
        "a temperature that is a word": {"temperature": "warm"},
        "messages that are a text": {"messages": "hello"},
    }
    with _served(project) as client:
        good = {"model": client.models.list().data[0].id, "max_tokens": 4, "temperature": 0}
        good["messages"] = [{"role": "user", "content": "x = "}]
        for told, change in bad.items():
            refusal = None
            try:
                client.post("/chat/completions", body=good | change, cast_to=object)
            except APIStatusError as error:
                refusal = error
            assert refusal, f"{told.capitalize()} was accepted."
            assert 400 <= refusal.status_code < 500, f"{told.capitalize()}: status {refusal.status_code}."
            assert refusal.response.text.strip(), f"{told.capitalize()}: refused without a word."
        _write(client, PROMPTS[0])
    return f"{len(bad)} kinds."


def survives_leaving(project: ModuleType) -> str:
    """Clients that leave in the middle of a stream cost the others nothing."""
    with _served(project) as client:
        alone = _write(client, PROMPTS[2])
        for _ in range(40):
            stream = _ask(client, PROMPTS[3], tokens=200, stream=True)
            next(iter(stream))
            stream.close()
        begun = time.monotonic()
        after = _write(client, PROMPTS[2])
        took = time.monotonic() - begun
    assert after == alone, f"After 40 clients left, it says {after!r}, before {alone!r}."
    assert took < 30, f"After 40 clients left, {TOKENS} tokens take {took:.0f} s."
    return f"After 40 of them, {TOKENS} tokens take {took:.1f} s."


def batches_faster(project: ModuleType) -> str:
    """Sixteen requests at once take at most two thirds of the time that they take one after the other."""
    prompts = PROMPTS[:16]
    with _served(project) as client:
        _write(client, prompts[0])
        begun = time.monotonic()
        for prompt in prompts:
            _write(client, prompt)
        turned = time.monotonic()
        _at_once(lambda prompt: _write(client, prompt), prompts)
        one_by_one, at_once = turned - begun, time.monotonic() - turned
    ratio = one_by_one / at_once
    assert ratio >= 1.5, f"One after the other {one_by_one:.1f} s, at once {at_once:.1f} s."
    return f"{ratio:.1f} times as fast."
