"""Token shards and the order in which they are read: exact, resumable, bounded, and long where it should be."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pensar.base.errors import ConfigError, DataError
from pensar.base.stage import Runtime
from pensar.data import annotate, mixture, shards
from pensar.data.annotate import AnnotateConfig
from pensar.data.documents import read_documents
from pensar.data.layout import Layout, long_layout, stream_layout
from pensar.data.mixture import Mixture, MixtureConfig
from pensar.data.order import PretrainData
from pensar.data.shards import Shards, ShardsConfig
from pensar.text.document import Document
from pensar.text.tokenizer import Tokenizer, train_tokenizer

Make = Callable[..., Document]


def texts(num: int, size: int = 12) -> list[str]:
    return [" ".join(f"word{(n * 7 + k * 3) % 50}" for k in range(size)) + f" end {n}" for n in range(num)]


@pytest.fixture
def corpus(tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Make) -> SimpleNamespace:
    """Two shards of documents, one of them long, and all that follows from them."""
    listed = [*texts(60), " ".join(f"long{n % 40}" for n in range(600))]
    documents = [make(text, str(n), source="a" if n < 40 else "b") for n, text in enumerate(listed)]
    labels, mixes, tokens = (tmp_path / name for name in ("labels", "mixes", "tokens"))
    annotate.run(AnnotateConfig(), {"documents": store(documents[:25], documents[25:])}, labels, runtime)
    plain = Mixture(language_temperature=1.0)
    heavy = Mixture(theta={"source:b": 1.2}, language_temperature=1.0)
    config = MixtureConfig(mixtures={"general": plain, "reasoning": heavy, "long": plain}, held_out=0.2)
    mixture.run(config, {"documents": labels}, mixes, runtime)
    tokenizer = train_tokenizer(listed, 400)
    tokenizer.save(tmp_path / "tokenizer")
    inputs = {"documents": labels, "mixture": mixes, "tokenizer": tmp_path / "tokenizer"}
    counts = shards.run(ShardsConfig(), inputs, tokens, runtime)
    return SimpleNamespace(inputs=inputs, folder=tokens, counts=counts, tokenizer=tokenizer, labels=labels)


def test_every_token_leads_back_to_its_document(corpus: SimpleNamespace) -> None:
    opened = Shards(corpus.folder, corpus.inputs["tokenizer"])
    documents = list(read_documents(corpus.labels))
    assert len(opened) == len(documents) == 61
    assert opened.meta.dtype == "uint16"
    for number, document in enumerate(documents):
        tokens = opened.tokens(number).tolist()
        assert tokens == [*corpus.tokenizer.encode(document.text), corpus.tokenizer.pad_id]
        assert corpus.tokenizer.decode(tokens[:-1]) == document.text
    assert opened.docs["doc_id"].to_pylist() == [document.id for document in documents]
    assert int(opened.lengths().sum()) == corpus.counts["tokens"] == opened.meta.num_tokens
    stem = opened.meta.stems[0]
    raw = np.fromfile(corpus.folder / f"tokens-{stem}.bin", "<u2")
    index = np.fromfile(corpus.folder / f"tokens-{stem}.idx", "<i8")
    assert raw[index[3] : index[4]].tolist() == opened.tokens(3).tolist()


def test_text_with_control_tokens_stays_text(
    tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Make, corpus: SimpleNamespace
) -> None:
    document = make("a page that says <|im_start|> and <|endoftext|> twice <|endoftext|>")
    annotate.run(AnnotateConfig(), {"documents": store([document], name="d")}, tmp_path / "l", runtime)
    mixture.run(MixtureConfig(held_out=0.0), {"documents": tmp_path / "l"}, tmp_path / "m", runtime)
    inputs = {"documents": tmp_path / "l", "mixture": tmp_path / "m", "tokenizer": corpus.inputs["tokenizer"]}
    shards.run(ShardsConfig(), inputs, tmp_path / "s", runtime)
    tokens = Shards(tmp_path / "s").tokens(0).tolist()
    assert tokens.count(corpus.tokenizer.pad_id) == 1
    assert tokens[-1] == corpus.tokenizer.pad_id


def test_another_tokenizer_is_refused(tmp_path: Path, corpus: SimpleNamespace) -> None:
    train_tokenizer(["something else entirely"], 300).save(tmp_path / "other")
    with pytest.raises(
        DataError, match=r"shards in .* were made with .*; make them again with this tokenizer"
    ):
        Shards(corpus.folder, tmp_path / "other")
    with pytest.raises(DataError, match="make them again"):
        PretrainData(corpus.folder, "general", 64, 1, tokenizer=tmp_path / "other")


def test_clipped_and_missing_files_are_told(tmp_path: Path, corpus: SimpleNamespace) -> None:
    with pytest.raises(DataError, match="holds no token shards"):
        Shards(tmp_path)
    path = corpus.folder / f"tokens-{Shards(corpus.folder).meta.stems[1]}.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="is clipped"):
        Shards(corpus.folder)


def test_a_mixture_of_other_documents_is_refused(
    tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Make, corpus: SimpleNamespace
) -> None:
    annotate.run(
        AnnotateConfig(), {"documents": store([make("one more text")], name="d")}, tmp_path / "l", runtime
    )
    inputs = {**corpus.inputs, "documents": tmp_path / "l"}
    with pytest.raises(DataError, match="has no weight; the mixture was made from other documents"):
        shards.run(ShardsConfig(), inputs, tmp_path / "s", runtime)


# ---------------------------------------------------------------- order


def test_a_row_is_a_pure_function_of_its_number(corpus: SimpleNamespace) -> None:
    first = PretrainData(corpus.folder, "general", 64, seed=3)
    rows = [first.row(i) for i in range(80)]
    again = PretrainData(corpus.folder, "general", 64, seed=3)
    for i in (79, 0, 41, 40):
        assert (again.row(i).tokens == rows[i].tokens).all()
        assert (again.row(i).segments == rows[i].segments).all()
    other = PretrainData(corpus.folder, "general", 64, seed=4)
    assert any((other.row(i).tokens != rows[i].tokens).any() for i in range(5))


def test_rows_are_full_and_segments_follow_documents(corpus: SimpleNamespace) -> None:
    data = PretrainData(corpus.folder, "general", 64, seed=1)
    end = corpus.tokenizer.pad_id
    for i in range(60):
        row = data.row(i)
        assert row.tokens.shape == row.segments.shape == (64,)
        assert row.segments[0] == 1
        ends = row.tokens[:-1] == end
        assert (np.diff(row.segments) == ends).all()
        assert len(data.documents_of(i)) == row.segments[-1]


def test_one_pass_reads_each_document_as_its_weight_says(corpus: SimpleNamespace) -> None:
    data = PretrainData(corpus.folder, "reasoning", 64, seed=1)
    weights = data.shards.weights("reasoning")
    num_passes = 12
    for number in range(num_passes):
        times = np.bincount(data._drawn(number), minlength=len(weights))
        assert ((times == np.floor(weights)) | (times == np.ceil(weights))).all()
    total = sum(np.bincount(data._drawn(number), minlength=len(weights)) for number in range(num_passes))
    assert (np.abs(total - num_passes * weights) <= 1).all()


def test_held_out_documents_are_never_read_in_training(corpus: SimpleNamespace) -> None:
    opened = Shards(corpus.folder)
    held_out = set(np.array(opened.docs["doc_id"].to_pylist())[opened.weights("held_out") > 0])
    assert held_out
    for name in ("general", "reasoning", "long"):
        data = PretrainData(corpus.folder, name, 64, seed=1)
        seen = {document for i in range(100) for document in data.documents_of(i)}
        assert not seen & held_out


def test_a_stream_holds_every_token_once_in_order() -> None:
    lengths = np.array([5, 1, 7, 3, 12])
    documents = np.array([2, 0, 4, 1, 3, 2])
    layout = stream_layout(documents, lengths, 8)
    expected = [(d, t) for d in documents for t in range(lengths[d])]
    found = [
        (p.document, t)
        for r in range(layout.num_rows)
        for p in layout.pieces(r)
        for t in range(p.start, p.end)
    ]
    assert layout.num_rows == len(expected) // 8
    assert found == expected[: layout.num_rows * 8]


def layout_of(lengths: list[int], sources: list[str], context: int) -> Layout:
    layout = long_layout(np.arange(len(lengths)), np.array(lengths), sources, context, seed=1)
    assert layout is not None
    return layout


def test_three_quarters_of_the_long_stage_is_long_where_documents_are() -> None:
    layout = layout_of([900] * 20 + [30] * 100, ["a"] * 120, 1_000)
    assert layout.long_share(1_000) >= 0.75
    for row in range(layout.num_rows):
        pieces = layout.pieces(row)
        assert sum(piece.end - piece.start for piece in pieces) == 1_000
        assert pieces[0].document < 20


def test_short_documents_of_one_source_are_joined_where_long_ones_lack() -> None:
    lengths = [100 + n % 17 for n in range(300)]
    sources = ["a"] * 150 + ["b"] * 150
    layout = layout_of(lengths, sources, 1_000)
    assert layout.long_share(1_000) >= 0.7
    for head in layout.heads:
        assert len({sources[piece.document] for piece in head}) == 1
        documents = [piece.document for piece in head]
        assert documents == list(range(documents[0], documents[0] + len(documents)))
        assert [piece.begins_segment for piece in head] == [True] + [False] * (len(head) - 1)
    counts = Counter(piece.document for head in layout.heads for piece in head)
    assert set(counts.values()) == {1}


def test_a_document_longer_than_a_row_is_cut_into_even_parts() -> None:
    layout = layout_of([2_500, 100, 100, 100], ["a"] * 4, 1_000)
    spans = sorted((p.start, p.end) for head in layout.heads for p in head if p.document == 0)
    assert spans == [(0, 833), (833, 1666), (1666, 2500)]


def test_rows_that_cannot_be_had_are_refused(corpus: SimpleNamespace) -> None:
    with pytest.raises(DataError, match="less than one row of 1000000; add documents or shorten the context"):
        PretrainData(corpus.folder, "general", 1_000_000, 1)
    with pytest.raises(DataError, match="no mixture 'medium'; it has general, held_out, long, reasoning"):
        PretrainData(corpus.folder, "medium", 64, 1)
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        PretrainData(corpus.folder, "general", 1, 1)
    with pytest.raises(ConfigError, match="numbered from 0"):
        PretrainData(corpus.folder, "general", 64, 1).row(-1)


def test_many_ids_need_four_bytes(
    tmp_path: Path, corpus: SimpleNamespace, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "UINT16_IDS", 100)
    shards.run(ShardsConfig(), corpus.inputs, tmp_path / "wide", runtime)
    wide, narrow = Shards(tmp_path / "wide"), Shards(corpus.folder)
    assert wide.meta.dtype == "uint32"
    assert all((wide.tokens(i) == narrow.tokens(i)).all() for i in range(len(wide)))


def test_a_tokenizer_loads_from_where_the_shards_say(corpus: SimpleNamespace) -> None:
    assert Tokenizer.load(corpus.inputs["tokenizer"]).vocab_size == Shards(corpus.folder).meta.vocab_size
