"""One attempt at a stage: from its draft folder, fresh or left by a crash, to the rename that makes it done."""

import contextlib
import datetime
import logging
import platform
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from pensar.base.config import canonical
from pensar.base.errors import PensarError, RunError
from pensar.base.files import disk_full_message, is_disk_full, sweep_partial
from pensar.base.identity import Digests
from pensar.base.manifest import (
    MANIFEST,
    InputEntry,
    Manifest,
    Timings,
    damage,
    list_files,
    read_manifest,
    write_manifest,
)
from pensar.base.ranks import Crew
from pensar.base.stage import Counts, Runtime, Stage
from pensar.base.usage import ResourceUse

DRAFT_SUFFIX = ".draft"
LOG = "stage.log"
VERSIONED = ("pensar", "torch", "numpy", "tokenizers", "pyarrow", "safetensors", "msgspec")
"""Distributions whose versions a manifest records."""


def attempt(
    stage: Stage,
    fingerprint: str,
    inputs: Mapping[str, InputEntry],
    outside: Mapping[str, str],
    folder: Path,
    runtime: Runtime,
) -> Manifest:
    """Runs a stage in its draft folder and renames that to `folder` when all is written.

    Raises what the stage raises; RunError instead when the cause is a full disk or an input that has vanished.
    """
    draft = folder.with_name(folder.name + DRAFT_SUFFIX)
    sources = {role: folder.parent / entry.folder for role, entry in inputs.items()}
    try:
        _refuse_vanished(stage, sources, outside)
        resumed = draft.exists()
        draft.mkdir(parents=True, exist_ok=True)
        sweep_partial(draft)
        (draft / MANIFEST).unlink(missing_ok=True)
        runtime.logs.mkdir(parents=True, exist_ok=True)
        with _logged(stage, runtime.logs / LOG, resumed), _measured(runtime.crew) as measure:
            counts = stage.run(stage.config, sources, draft, runtime)
            timings = measure(resumed)
        sweep_partial(draft)
        _refuse_changed(stage, outside, Digests.of_run(folder.parent))
        manifest = _manifest(stage, fingerprint, inputs, outside, draft, counts, timings)
        write_manifest(draft, manifest)
        draft.rename(folder)
    except Exception as error:
        if is_disk_full(error) and not isinstance(error, RunError):
            raise RunError(f"stage `{stage.name}`: {disk_full_message(draft, error)}") from error
        if not isinstance(error, PensarError):
            _refuse_vanished(stage, sources, outside, error)
        error.add_note(f"in stage `{stage.name}`; its log: {runtime.logs / LOG}")
        raise
    # As it stands on the disk, keys sorted, so that a caller sees the same thing now and later.
    return read_manifest(folder)


def set_aside(folder: Path, why: str) -> None:
    """Renames a folder, if it is there, to `<name>.<why>-<number>`: nothing is ever deleted unasked."""
    if not folder.exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.{why}-{number}")).exists():
        number += 1
    folder.rename(target)


def _manifest(
    stage: Stage,
    fingerprint: str,
    inputs: Mapping[str, InputEntry],
    outside: Mapping[str, str],
    draft: Path,
    counts: Counts,
    timings: Timings,
) -> Manifest:
    return Manifest(
        stage=stage.name,
        revision=stage.revision,
        fingerprint=fingerprint,
        inputs=dict(inputs),
        config=canonical(stage.config),
        outside=dict(outside),
        files=list_files(draft),
        counts=counts,
        versions=_versions(),
        timings=timings,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _refuse_vanished(
    stage: Stage, sources: Mapping[str, Path], outside: Mapping[str, str], cause: Exception | None = None
) -> None:
    """RunError if something that the stage reads is not there (any more)."""
    for role, source in sources.items():
        wrong = None if source.is_dir() else f"folder {source} is missing"
        if wrong is None and (source / MANIFEST).exists():
            wrong = damage(source, read_manifest(source))
        if wrong is not None:
            raise RunError(
                f"input {role} of stage `{stage.name}` has vanished: {wrong}; run again: what is missing is done anew"
            ) from cause
    for path in outside:
        if not Path(path).exists():
            raise RunError(
                f"{path}, which stage `{stage.name}` reads, has vanished; put it back and run again"
            ) from cause


def _refuse_changed(stage: Stage, outside: Mapping[str, str], digests: Digests) -> None:
    """A fingerprint must not speak for content that was replaced while the stage read it."""
    for path, digest in outside.items():
        if digests.of(Path(path)) != digest:
            raise RunError(
                f"{path} changed while stage `{stage.name}` read it; run again once it stays as it is"
            )


class _Measure:
    """Clock, processor time and peak memory since its creation."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        crew.reset_peaks()
        self._before = crew.usage()
        self._start = time.perf_counter()

    def __call__(self, resumed: bool) -> Timings:
        seconds = time.perf_counter() - self._start
        after = self._crew.usage()
        none = ResourceUse(0.0, 0)
        cpu = sum(use.cpu_seconds - self._before.get(pid, none).cpu_seconds for pid, use in after.items())
        return Timings(
            seconds=round(seconds, 3),
            cpu_seconds=round(cpu, 3),
            peak_memory_bytes=sum(use.peak_memory_bytes for use in after.values()),
            ranks=len(after),
            resumed=resumed,
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        )


@contextlib.contextmanager
def _measured(crew: Crew) -> Iterator[_Measure]:
    yield _Measure(crew)


@contextlib.contextmanager
def _logged(stage: Stage, path: Path, resumed: bool) -> Iterator[None]:
    """Sends what the package logs meanwhile to `path`, appended, with the error that ended the stage if one did."""
    logger = logging.getLogger("pensar")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        logger.info("stage %s %s", stage.name, "goes on from its draft" if resumed else "begins")
        yield
        logger.info("stage %s done", stage.name)
    except BaseException:
        logger.exception("stage %s failed", stage.name)
        raise
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
