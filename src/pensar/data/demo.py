"""The first stage of the tiny recipe: packs documents that every machine has into the formats of anyone's data.

The Python language reference becomes a WARC file of HTML pages, with the clutter of real pages, near-duplicates and
junk whose addresses say what they are; the standard library a folder of code; our own multilingual passages PDF,
Parquet and JSON Lines; our problems compressed JSON Lines. Everything after this stage treats them as a stranger's.
"""

import gzip
import platform
import sysconfig
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from pensar.base.config import Config
from pensar.base.errors import ConfigError, DataError
from pensar.base.files import seed_of, write_atomic
from pensar.base.stage import Counts, Runtime
from pensar.data.demo_pages import reference_pages
from pensar.data.demo_pdf import fits_pdf, leaflet
from pensar.data.documents import write_table
from pensar.data.sources import Source
from pensar.data.warc import warc_file

SKIPPED_CODE = (
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "lib2to3",
    "pydoc_data",
    "turtledemo",
    "__pycache__",
)
MAX_CODE_FILE_BYTES = 120_000
MIN_CODE_FILE_BYTES = 500
PASSAGES = "passages"
SOURCES = (
    Source(name="python-reference", path="demo:web/*.warc.gz", license="PSF-2.0"),
    Source(name="standard-library", path="demo:code", format="code", license="PSF-2.0"),
    Source(name="passages-pdf", path="demo:passages/*.pdf", license="Apache-2.0"),
    Source(name="passages-parquet", path="demo:passages/*.parquet", license="Apache-2.0"),
    Source(name="passages-jsonl", path="demo:passages/*.jsonl", license="Apache-2.0"),
    Source(name="problems", path="demo:tasks/*.jsonl.gz", kind="task", license="Apache-2.0"),
)
"""What reads the packed files, by the input role `demo`."""
Row = dict[str, str]


class DemoConfig(Config, frozen=True, kw_only=True):
    """How much is packed."""

    python: str = ""
    """Version of the Python whose reference and library are packed; the recipe fills it in, and another Python
    refuses, since its documents are others."""
    seed: int = 0
    max_topics: int = 1_000
    near_duplicates: int = 10
    max_code_files: int = 300
    max_code_bytes: int = 3_000_000
    problems: int = 1_000
    """Documents of each domain of our own problems."""
    reasoning_gym: int = 0
    """Worked problems from reasoning-gym, which must be installed when this is not 0."""


def run(config: DemoConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Writes web/, code/, passages/ and tasks/; the same configuration gives the same bytes."""
    del inputs
    require_python(config.python)
    files: Counts = {}
    with runtime.progress.track("packing the demonstration corpus", 4, unit="part") as track:
        files["web"] = _pack_web(config, out / "web")
        track.advance()
        files["code"] = _pack_code(config, out / "code")
        track.advance()
        files["passages"] = _pack_passages(out / "passages")
        track.advance()
        files["tasks"] = _pack_tasks(config, out / "tasks")
        track.advance()
    size = sum(
        path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"
    )
    documents = sum(part["documents"] for part in files.values())
    return {
        "documents_in": documents,
        "documents_out": documents,
        "bytes_in": sum(part["bytes"] for part in files.values()),
        "bytes_out": size,
        "dropped": {},
        "parts": files,
    }


def require_python(version: str) -> None:
    """Raises ConfigError unless this Python is the one whose documents the recipe names."""
    running = platform.python_version()
    if version != running:
        raise ConfigError(
            f"demo.python is {version or 'empty'!r}, but this is Python {running}, whose reference and library "
            f"differ; set it to {running}, as recipes do by themselves, or run with the Python that it names"
        )


def code_files(config: DemoConfig, root: Path) -> list[Path]:
    """A sample of the library's modules, by a hash of their names, within both limits; sorted."""
    candidates = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in SKIPPED_CODE or part.startswith("config-") for part in parts):
            candidates.append(path)
    candidates.sort(key=lambda path: seed_of(config.seed, "code", path.relative_to(root).as_posix()))
    chosen: list[Path] = []
    total = 0
    for path in candidates:
        size = path.stat().st_size
        fits = MIN_CODE_FILE_BYTES <= size <= MAX_CODE_FILE_BYTES and total + size <= config.max_code_bytes
        if fits and len(chosen) < config.max_code_files:
            chosen.append(path)
            total += size
    return sorted(chosen)


def read_passages(folder: Path) -> dict[str, list[Row]]:
    """Language code -> its passages with title, text and topic; raises DataError for a row without them."""
    passages: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        rows: list[Row] = []
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            row = msgspec.json.decode(line)
            if not isinstance(row, dict) or not all(
                isinstance(row.get(key), str) for key in ("title", "text", "topic")
            ):
                raise DataError(f"{path}:{number} lacks title, text or topic")
            rows.append(row)
        passages[path.stem] = rows
    return passages


def _pack_web(config: DemoConfig, out: Path) -> Counts:
    pages = reference_pages(config.max_topics, config.near_duplicates, config.seed)
    write_atomic(out / "python-reference.warc.gz", warc_file(pages))
    return {"documents": len(pages), "bytes": sum(len(body) for *_, body in pages)}


def _pack_code(config: DemoConfig, out: Path) -> Counts:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = code_files(config, root)
    total = 0
    for path in files:
        content = path.read_bytes()
        total += len(content)
        write_atomic(out / path.relative_to(root), content)
    return {"documents": len(files), "bytes": total}


def _pack_passages(out: Path) -> Counts:
    """Every third language that the built-in fonts can write goes to PDF, a passage a file; the others to Parquet and
    JSONL."""
    passages = read_passages(Path(__file__).with_name(PASSAGES))
    writable = [code for code, rows in passages.items() if fits_pdf(rows)]
    printed = set(writable[::3])
    rest = [code for code in passages if code not in printed]
    tables: dict[str, list[Row]] = {"parquet": [], "jsonl": []}
    total = num = num_files = 0
    for code, rows in passages.items():
        total += sum(len(row["text"].encode()) for row in rows)
        num += len(rows)
        if code in printed:
            for number, row in enumerate(rows, start=1):
                write_atomic(out / f"{code}-{number}.pdf", leaflet(code, row))
            num_files += len(rows)
            continue
        form = "parquet" if rest.index(code) % 2 else "jsonl"
        tables[form] += [{"language": code, **row} for row in rows]
    names = ("language", "title", "topic", "text")
    write_table(out / "passages.parquet", pa.table({n: [row[n] for row in tables["parquet"]] for n in names}))
    lines = [msgspec.json.encode({name: row[name] for name in names}) + b"\n" for row in tables["jsonl"]]
    write_atomic(out / "passages.jsonl", b"".join(lines))
    return {"documents": num, "bytes": total, "languages": len(passages), "pdf_files": num_files}


def _pack_tasks(config: DemoConfig, out: Path) -> Counts:
    from pensar.tasks.problems import pretraining_texts

    texts = list(pretraining_texts(config.problems, config.seed))
    write_atomic(out / "problems.jsonl.gz", _zipped_rows(texts))
    if config.reasoning_gym:
        more = list(_reasoning_gym(config))
        write_atomic(out / "reasoning-gym.jsonl.gz", _zipped_rows(more))
        texts += more
    return {"documents": len(texts), "bytes": sum(len(text.encode()) for _, text in texts)}


def _reasoning_gym(config: DemoConfig) -> Iterable[tuple[str, str]]:
    try:
        module: Any = import_module("pensar.tasks.reasoning_gym")
    except ImportError as error:
        raise ConfigError(
            f"demo.reasoning_gym is {config.reasoning_gym}, but reasoning-gym is not there ({error}); "
            "pip install reasoning-gym, or set it to 0"
        ) from None
    texts: Iterable[tuple[str, str]] = module.texts(config.reasoning_gym, config.seed)
    return texts


def _zipped_rows(texts: Iterable[tuple[str, str]]) -> bytes:
    """Rows of id, domain (the id up to its number), language and text, as gzip without a time stamp."""
    rows = [
        {"id": name, "domain": name.rpartition("-")[0] or "task", "language": "eng_Latn", "text": text}
        for name, text in texts
    ]
    return gzip.compress(b"".join(msgspec.json.encode(row) + b"\n" for row in rows), compresslevel=6, mtime=0)
