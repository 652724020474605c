"""Manifest: what an artifact is, what it came from, and which files belong to it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pensar.base.errors import DataError
from pensar.base.files import files_under, sha256, write_atomic

MANIFEST = "manifest.json"
FINGERPRINT_SHOWN = 12
"""Digits of the fingerprint in a folder's name."""
FOLDER = re.compile(rf"(?P<stage>.+)-(?P<fingerprint>[0-9a-f]{{{FINGERPRINT_SHOWN}}})")


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    bytes: int
    sha256: str


class InputEntry(msgspec.Struct, frozen=True, kw_only=True):
    stage: str
    fingerprint: str
    folder: str
    """Beside this artifact's folder, or an absolute path where the input was adopted."""


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """All that may differ between two runs of the same work."""

    seconds: float
    cpu_seconds: float
    """Of all ranks together."""
    peak_memory_bytes: int
    """Sum over the ranks of each one's highest memory."""
    ranks: int
    resumed: bool
    """The stage went on from a draft: the times are of its last attempt only."""
    finished: str
    """UTC, ISO 8601."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `manifest.json`; everything but `timings` is the same for the same work."""

    stage: str
    revision: int
    fingerprint: str
    inputs: dict[str, InputEntry]
    """By role."""
    config: dict[str, Any]
    """Defaults omitted."""
    outside: dict[str, str]
    """Path of each file or folder beyond the run that was read, and its digest."""
    files: dict[str, FileEntry]
    """By path below the artifact's folder; the manifest itself is not among them."""
    counts: dict[str, Any]
    versions: dict[str, str]
    timings: Timings
    format: int = 1


@dataclass(frozen=True)
class Artifact:
    """A folder and what is known of it; an adopted folder may have no manifest."""

    folder: Path
    manifest: Manifest | None

    @property
    def name(self) -> str:
        return self.folder.name


def folder_name(stage: str, fingerprint: str) -> str:
    """The folder of a stage's artifact in its run."""
    return f"{stage}-{fingerprint[:FINGERPRINT_SHOWN]}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact; DataError where there is none, or none that can be read."""
    path = folder / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} holds no {MANIFEST}: it is not an artifact of a run") from None
    except msgspec.DecodeError as error:
        raise DataError(f"{path} is not a manifest: {error}") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes it atomically, keys sorted so that equal manifests are equal files."""
    data = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2)
    write_atomic(folder / MANIFEST, data + b"\n")


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Size and digest of every file of an artifact."""
    return {
        name: FileEntry(bytes=path.stat().st_size, sha256=sha256(path))
        for name, path in files_under(folder).items()
        if name != MANIFEST
    }


def damage(folder: Path, manifest: Manifest, *, digests: bool = False) -> str | None:
    """What is wrong with an artifact's files, or None; sizes always, contents when `digests` are asked for."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"file {name} is missing"
        size = path.stat().st_size
        if size != entry.bytes:
            return f"file {name} has {size:,} bytes, {entry.bytes:,} recorded"
        if digests and sha256(path) != entry.sha256:
            return f"file {name} has changed since it was written (SHA-256 differs)"
    return None


def artifacts_in(root: Path) -> list[Artifact]:
    """The finished artifacts of a run, newest first; folders with unreadable manifests are left out."""
    found = []
    for folder in root.iterdir() if root.is_dir() else []:
        if not FOLDER.fullmatch(folder.name) or folder.is_symlink():
            continue
        try:
            found.append(Artifact(folder, read_manifest(folder)))
        except DataError:
            continue
    return sorted(found, key=_finished, reverse=True)


def _finished(artifact: Artifact) -> tuple[str, str]:
    assert artifact.manifest is not None
    return artifact.manifest.timings.finished, artifact.name
