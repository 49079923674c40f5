"""The judge: a lesson's checks in a process of their own, outside the learner's.

    worker ─┬─ judge    given cells, every check, expected values; proxies for the exercises' names (proxies.py)
            │      ⇅ one socket: msgpack messages (messages.py), values only (values.py), never code or pickles
            └─ learner  the Jupyter kernel: given cells, the learner's cells, and an agent that answers (agent.py)

`link.py` is one end of the socket, with its tables of objects; `court.py` is the judge's process; `client.py` is the
worker's side of it.
"""
