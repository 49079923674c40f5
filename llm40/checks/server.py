"""Servers that a learner's code runs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reachable(path: str) -> Iterator[str]:
    """The path at which a check's client meets a server of the learner's, which listens at the UNIX socket `path`.

    In a notebook it is the same path. In grading the server runs behind the learner's walls, and the path is one of the
    judge's own, which leads there while the block runs::

        with checks.reachable(server.path) as path, httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client:
            assert client.get("http://llm40/health").status_code == 200
    """
    yield path
