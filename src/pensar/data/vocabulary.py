"""The tokenizer stage: learns the byte-level vocabulary from the documents, as the general mixture weighs them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from pensar.base.config import Config
from pensar.base.errors import DataError
from pensar.base.files import seed_of
from pensar.base.stage import Counts, Runtime
from pensar.data.documents import read_documents, read_table
from pensar.tasks.tools import LOOKUP
from pensar.text.chat import STOP_SENTENCE, render
from pensar.text.conversation import Conversation, Message, ToolCall
from pensar.text.tokenizer import train_tokenizer


class VocabularyConfig(Config, frozen=True, kw_only=True):
    size: int = 1_280
    """Entries with the 26 control tokens; Qwen3 has 151,669."""
    mixture: str = "general"
    max_bytes: int = 4_000_000
    """Text to learn from: documents in the order of a hash until this much is read."""
    protocol_copies: int = 40
    """How often the fixed wording of the chat format is shown, so that it takes few tokens."""
    max_positions: int = 32_768


def run(config: VocabularyConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `documents` and `mixture`; writes tokenizer.json and tokenizer_config.json."""
    texts = list(_texts(config, inputs))
    if not texts:
        raise DataError(
            f"no document has weight in mixture {config.mixture!r}; there is nothing to learn words from"
        )
    tokenizer = train_tokenizer(
        [*texts, *[protocol_text()] * config.protocol_copies],
        config.size,
        model_max_length=config.max_positions,
    )
    tokenizer.save(out)
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts[:500]))
    num_sampled = sum(len(text.encode()) for text in texts[:500])
    return {
        "documents_in": len(texts),
        "bytes_in": num_bytes,
        "vocabulary": tokenizer.vocab_size,
        "bytes_per_token": round(num_sampled / max(num_tokens, 1), 4),
    }


def protocol_text() -> str:
    """What the chat format itself says: tool instructions, a call, its answer, the sentence at a budget's end."""
    conversation = Conversation(
        messages=(
            Message(role="system", content="You are a helpful assistant."),
            Message(role="user", content="Hello /think /no_think"),
            Message(role="assistant", tool_calls=(ToolCall(name="lookup", arguments={"words": "it"}),)),
            Message(role="tool", content="1"),
        ),
        tools=(LOOKUP,),
    )
    return render(conversation) + STOP_SENTENCE


def _texts(config: VocabularyConfig, inputs: Mapping[str, Path]) -> Iterator[str]:
    table = read_table(inputs["mixture"] / f"mixture-{config.mixture}.parquet")
    names, weights = table.column("id").to_pylist(), table.column("weight").to_pylist()
    weight_of = dict(zip(names, weights, strict=True))
    documents = [
        document for document in read_documents(inputs["documents"]) if weight_of.get(document.id, 0) > 0
    ]
    documents.sort(key=lambda document: seed_of("vocabulary", document.id))
    left = config.max_bytes
    for document in documents:
        if left <= 0:
            return
        left -= len(document.text.encode())
        yield document.text
