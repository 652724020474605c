"""Tokenizer: byte-level BPE whose control tokens can be inserted by id but never be spelled by a text.

The rules (NFC, splitting expression, byte alphabet, order of the control tokens) are Qwen3's, so a trained
tokenizer and a downloaded Qwen3 one are the same kind of file and differ in their merges only.
"""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pensar.base.errors import ConfigError, DataError, ModelError
from pensar.base.files import write_atomic
from pensar.text.template import CHAT_TEMPLATE

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
THINK = "<think>"
THINK_END = "</think>"

SPECIAL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Control tokens that `skip_special` leaves out of a decoded text."""

TAG_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    THINK,
    THINK_END,
)
"""Control tokens that belong to the text of a reply; they follow the special ones in the vocabulary."""

CONTROL_TOKENS = SPECIAL_TOKENS + TAG_TOKENS
NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + len(CONTROL_TOKENS)

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen3 cuts a text before merging; digits stand alone."""

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


class Tokenizer:
    """Text to token ids and back.

    `encode` gives ids of the byte-level vocabulary only: a text that holds `<|im_end|>` or `<think>` is
    encoded as those characters. Control tokens are obtained from `special` and inserted by whoever builds a
    prompt.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", config: dict[str, Any]) -> None:
        import tokenizers

        if not isinstance(backend.model, tokenizers.models.BPE):
            raise ModelError(
                f"{TOKENIZER_FILE} holds a {type(backend.model).__name__} model; only byte-level BPE is "
                "supported, as in every Qwen model"
            )
        self._backend = backend
        # A second front on the same merges that knows no added tokens: this is what makes `encode` plain BPE.
        self._plain = tokenizers.Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        self._added = {
            str(token.content): (int(number), bool(token.special))
            for number, token in backend.get_added_tokens_decoder().items()
        }
        self._config = config

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Opens the tokenizer of a Hugging Face model directory.

        Raises ModelError when `tokenizer.json` is missing and DataError when a file cannot be read.
        """
        import tokenizers

        path = Path(folder) / TOKENIZER_FILE
        if not path.is_file():
            raise ModelError(
                f"{path} is missing; a model directory needs its {TOKENIZER_FILE} beside config.json"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of bad content
            raise DataError(
                f"{path} cannot be read as a tokenizer ({error}); fetch or train it again"
            ) from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, _read_config(Path(folder)))

    def save(self, folder: Path | str, *, model_max_length: int | None = None) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` (with the chat template) into `folder`.

        `model_max_length` in tokens; None keeps the value that the tokenizer was loaded or trained with.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        config = dict(self._config)
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        write_atomic(target / TOKENIZER_FILE, self._backend.to_str(pretty=False))
        write_atomic(target / CONFIG_FILE, json.dumps(config, ensure_ascii=False, indent=2) + "\n")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never a control token's; a lone surrogate becomes U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text; a long batch uses all threads that the library is allowed."""
        try:
            encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeError):
            encodings = self._plain.encode_batch_fast(list(_well_formed(texts)), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        `skip_special` leaves out the turn marks but keeps the thinking and tool tags, which are part of a
        reply.
        """
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The exact bytes of `ids`; an id beyond the vocabulary (padding rows of the embedding) has none."""
        table = self._spoken_bytes if skip_special else self._token_bytes
        size = len(table)
        return b"".join([table[token] for token in ids if token < size])

    def special(self, name: str) -> int:
        """The id of a control token such as `<|im_end|>`."""
        try:
            return self._added[name][0]
        except KeyError:
            raise ModelError(
                f"this tokenizer has no control token {name!r}; it has {', '.join(self._added) or 'none'}"
            ) from None

    @property
    def control_tokens(self) -> dict[str, int]:
        """Every control token's id by name, in the order of the vocabulary."""
        return {name: number for name, (number, _) in self._added.items()}

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included; the embedding may have more rows."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def eos_id(self) -> int:
        """The end of a turn, `<|im_end|>`."""
        return self.special(TURN_END)

    @cached_property
    def pad_id(self) -> int:
        """The padding and the end of a document, `<|endoftext|>`."""
        return self.special(END_OF_TEXT)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that came with the tokenizer, or ours for one that was trained here."""
        template = self._config.get("chat_template")
        return template if isinstance(template, str) else None

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same tokenizer that carries and follows another chat template, such as CHAT_TEMPLATE."""
        return Tokenizer(self._backend, {**self._config, "chat_template": template})

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        table = [b""] * max(self.vocab_size, 1 + max([*vocabulary.values(), *self.control_tokens.values()]))
        to_latin = {ord(char): byte for byte, char in enumerate(byte_alphabet())}
        for token, number in vocabulary.items():
            table[number] = token.translate(to_latin).encode("latin-1")
        for name, number in self.control_tokens.items():
            table[number] = name.encode()
        return table

    @cached_property
    def _spoken_bytes(self) -> list[bytes]:
        table = list(self._token_bytes)
        for number, special in self._added.values():
            if special:
                table[number] = b""
        return table


class StreamDecoder:
    """Decodes a reply piece by piece; the pieces joined equal the decoding of the whole."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; the bytes of an unfinished character wait for the next call."""
        return self._characters.decode(self._tokenizer.decode_bytes(ids, self._skip_special))

    def close(self) -> str:
        """What is left: U+FFFD where the stream broke off inside a character."""
        return self._characters.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, model_max_length: int = 32_768) -> Tokenizer:
    """Learns merges from `texts`; equal texts in equal order give an equal tokenizer.

    `vocab_size` counts bytes, merges and control tokens; the result is smaller where no pair of tokens is
    left that occurs twice. Raises ConfigError when it leaves no room for the bytes and the control tokens.
    """
    import tokenizers

    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size {vocab_size} is below {MIN_VOCAB_SIZE} ({NUM_BYTES} bytes and {len(CONTROL_TOKENS)} "
            "control tokens); choose at least that"
        )
    backend = tokenizers.Tokenizer.from_str(json.dumps(_untrained()))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=list(byte_alphabet()),
    )
    backend.train_from_iterator(_well_formed(texts), trainer)
    for name in CONTROL_TOKENS:
        backend.add_tokens([tokenizers.AddedToken(name, normalized=False, special=name in SPECIAL_TOKENS)])
    return Tokenizer(backend, _config_of_trained(backend, model_max_length))


def byte_alphabet() -> str:
    """The printable character that stands for each byte 0..255 in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(substitutes)) for byte in range(NUM_BYTES))


def _untrained() -> dict[str, Any]:
    """A `tokenizer.json` with Qwen3's rules and no vocabulary."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }


def _well_formed(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        else:
            yield text


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    config: dict[str, Any] = {}
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON ({error}); fetch or write it again") from error
        if not isinstance(config, dict):
            raise DataError(f"{path} holds a {type(config).__name__}, not an object; fetch or write it again")
    template = folder / TEMPLATE_FILE
    if template.is_file():  # newer model directories keep the template in a file of its own
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


def _config_of_trained(backend: "tokenizers.Tokenizer", model_max_length: int) -> dict[str, Any]:
    """What transformers, vLLM and llama.cpp's converter expect beside a Qwen3 `tokenizer.json`."""
    added = {
        str(number): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for number, token in sorted(backend.get_added_tokens_decoder().items())
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "errors": "replace",
        "model_max_length": model_max_length,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
