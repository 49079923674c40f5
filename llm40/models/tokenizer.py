"""The models' tokenizer: byte-level BPE of 4,096 entries, trained with the `tokenizers` library on the models' text.

Sennrich et al. 2016, arXiv:1508.07909 (BPE); Radford et al. 2019 (byte level). Every byte has a token, so any text can
be written. A digit is always a token of its own, which makes arithmetic learnable for a small model.
"""

from collections.abc import Iterable

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPE

# In this order, so that <|endoftext|> is token 0. Only it is seen in pretraining; the rest are there for finetuning.
SPECIAL = [
    "<|endoftext|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",  # a chat's roles, and the end of a message
    "<|tools|>",
    "<|call|>",
    "<|/call|>",  # the tools on offer; a call to one of them
    "<|think|>",
    "<|/think|>",
    "<|mask|>",
    "<|reserved_0|>",
    "<|reserved_1|>",
    "<|reserved_2|>",
]
# Merges stay inside: an English contraction, a word with its space, one digit, a run of signs, a run of white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Text to token ids and back. `eos` ends a document, `pad` fills a batch; `special` is {special token: id}."""

    def __init__(self, bpe: BPE):
        self._bpe = bpe
        self.special = {token: bpe.token_to_id(token) for token in SPECIAL}
        self.eos, self.pad = self.special["<|endoftext|>"], self.special["<|pad|>"]
        self.vocab_size = bpe.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 4096) -> "Tokenizer":
        bpe = BPE(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=SPECIAL,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, seen or not
                show_progress=False,
            ),
        )
        return cls(bpe)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        return cls(BPE.from_str(text))

    def to_json(self) -> str:
        return self._bpe.to_str()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`. What looks like a special token in it is ordinary text, unless `special` is True: a
        user cannot forge the end of a message. Lone surrogates, which are not Unicode text, raise TypeError."""
        self._bpe.encode_special_tokens = not special
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, on all cores."""
        self._bpe.encode_special_tokens = True
        return [encoding.ids for encoding in self._bpe.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], special: bool = True) -> str:
        """The text of `ids`; special tokens are written out, or left out where `special` is False. Bytes that are not
        whole UTF-8, as when a character is cut, become U+FFFD."""
        return self._bpe.decode([int(i) for i in ids], skip_special_tokens=not special)

    def token(self, id: int) -> str:
        """One token as the vocabulary writes it: bytes as printable characters, a space as "Ġ", a line feed as "Ċ"."""
        return self._bpe.id_to_token(int(id))

    def chat(self, messages: list[dict[str, str]], reply: bool = True) -> list[int]:
        """Ids of a conversation [{"role": "user", "content": …}, …]: for each message its role's token, its text and
        <|end|>. With `reply`, <|assistant|> follows, for the model to go on from. Roles: system, user, assistant and
        tool."""
        ids = []
        for message in messages:
            role = message["role"]
            if role not in ("system", "user", "assistant", "tool"):
                raise ValueError(f"no role {role!r}: use system, user, assistant or tool")
            ids += [self.special[f"<|{role}|>"], *self.encode(message["content"]), self.special["<|end|>"]]
        return ids + [self.special["<|assistant|>"]] * reply
