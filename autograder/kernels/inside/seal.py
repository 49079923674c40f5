"""Messages between the grader and its guard, which nobody else can read or make."""

from hashlib import blake2b, shake_256  # C code: what becomes of the module is nothing to us

SEAL = 32  # bytes


def sealed(key: bytes, number: int, data: bytes) -> bytes:
    """A message that only those who have the key can read, or could have made; `number` is another one every time."""
    once = key + number.to_bytes(8, "big")
    stream = shake_256(once).digest(len(data))
    hidden = (int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(data), "big")
    return blake2b(once + hidden, key=key, digest_size=SEAL).digest() + hidden


def opened(key: bytes, number: int, message: bytes) -> bytes:
    """What `sealed` was given. ValueError for a message that is not of it."""
    once, hidden = key + number.to_bytes(8, "big"), message[SEAL:]
    if blake2b(once + hidden, key=key, digest_size=SEAL).digest() != message[:SEAL]:
        raise ValueError("a message that is not ours")
    stream = shake_256(once).digest(len(hidden))
    return (int.from_bytes(hidden, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(hidden), "big")


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(8, "big") + message


def received(receive, size: int) -> bytes:
    """That many bytes from a connection. EOFError where it ends before."""
    parts = b""
    while len(parts) < size:
        part = receive(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts
