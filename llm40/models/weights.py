"""Reading and writing trained models: half-precision safetensors, a tokenizer and their checksums, in one folder."""

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from llm40 import profile
from llm40.models.llama import CONFIGS, Llama
from llm40.models.mtp import MTP
from llm40.models.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "weights"
CHECKPOINTS = ("tiny-step460", "tiny-step510", "tiny-step560")  # at the full learning rate; the last fifth decays it


class WeightsError(RuntimeError):
    """A file of a trained model is missing or is not the one that was shipped."""


def _read(folder: Path, name: str) -> bytes:
    """The bytes of a file, if they are those that were saved."""
    path = folder / name
    try:
        content = path.read_bytes()
        expected = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))[name]
    except FileNotFoundError as error:
        raise WeightsError(
            f"{error.filename} is missing: get it back from the course's archive or with `git checkout`, "
            "or train your own with `python -m llm40.models.train --tokenizer --minutes 60 --out FOLDER` and load it "
            "with `load(size, FOLDER)`"
        ) from None
    except (KeyError, ValueError):
        listing = folder / "checksums.json"
        raise WeightsError(f"{listing} says nothing about {name}: get the whole folder back") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise WeightsError(
            f"{path} is damaged: its SHA-256 is not the one in checksums.json. Get the file back from the course's "
            "archive or with `git checkout` (a text filter, such as one for line ends, may have changed it)"
        )
    return content


def write(folder: Path, name: str, content: bytes) -> None:
    """Saves a file and its checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    listing = folder / "checksums.json"
    checksums = json.loads(listing.read_text(encoding="utf-8")) if listing.exists() else {}
    checksums[name] = hashlib.sha256(content).hexdigest()
    listing.write_text(json.dumps(checksums, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def load_tokenizer(folder: Path = SHIPPED) -> Tokenizer:
    return Tokenizer.from_json(_read(Path(folder), "tokenizer.json").decode())


def load(
    size: str = "small",
    folder: Path = SHIPPED,
    device: torch.device | str = profile.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Llama, Tokenizer]:
    """A trained model, in evaluation mode, and its tokenizer. `size` is "small" (6.0 M parameters), "tiny" (0.7 M), or
    one of CHECKPOINTS, which are states of `tiny` before its training's end.

    Raises WeightsError, which names the file, where one is missing or damaged.
    """
    if size not in (*CONFIGS, *CHECKPOINTS):
        raise ValueError(f"no model of size {size!r}: use {' or '.join(CONFIGS)}, or {', '.join(CHECKPOINTS)}")
    model = _filled(lambda: Llama(CONFIGS[size.partition("-")[0]]), size, folder, device, dtype)
    return model, load_tokenizer(folder)


def load_mtp(
    folder: Path = SHIPPED, device: torch.device | str = profile.device, dtype: torch.dtype = torch.float32
) -> MTP:
    """The multi-token-prediction block of `small` (0.84 M parameters), in evaluation mode. Errors as `load`."""
    return _filled(lambda: MTP(CONFIGS["small"]), "small-mtp", folder, device, dtype)


def scaling_runs(folder: Path = SHIPPED) -> list[dict]:
    """Finished training runs of small models on bytes: [{"parameters": without the embedding, "tokens": bytes read,
    "flops": 6 · parameters · tokens, "loss": held out, nats a byte, "seed": …, …}, …]. Errors as `load`."""
    return json.loads(_read(Path(folder), "scaling_runs.json"))


def _filled(make, name: str, folder: Path, device, dtype):
    """The module that `make` makes, with the weights of a file."""
    stored = safetensors.torch.load(_read(Path(folder), f"{name}.safetensors"))
    with torch.random.fork_rng(devices=[]):  # loading draws nothing from the caller's random numbers
        module = make()  # on the "meta" device this would be free, but import much of PyTorch
    module.load_state_dict({name: tensor.to(device, dtype) for name, tensor in stored.items()}, assign=True)
    return module.eval()


def save(name: str, state: dict[str, Tensor], folder: Path) -> None:
    """Writes `{name}.safetensors`, in float16, and its checksum."""
    half = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in state.items()}
    write(Path(folder), f"{name}.safetensors", safetensors.torch.save(half, metadata={"format": "pt"}))
