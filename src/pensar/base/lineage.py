"""Lineage: from an artifact back to all that formed it, and on to all that was made from it."""

from pathlib import Path

from pensar.base.errors import DataError
from pensar.base.manifest import Artifact, artifacts_in, read_manifest


def open_artifact(path: Path) -> Artifact:
    """The artifact in a folder or behind a link; DataError if the folder does not exist."""
    folder = path.resolve()
    if not folder.is_dir():
        raise DataError(f"{path} is no folder; give the folder of an artifact, such as runs/tiny/model")
    try:
        return Artifact(folder, read_manifest(folder))
    except DataError:
        return Artifact(folder, None)


def ancestors(path: Path) -> list[Artifact]:
    """Every artifact that went into the one in `path`, each before those made from it; itself left out.

    Inputs whose folders are gone are listed without a manifest.
    """
    found: dict[Path, Artifact] = {}

    def visit(artifact: Artifact) -> None:
        for entry in artifact.manifest.inputs.values() if artifact.manifest else ():
            folder = (artifact.folder.parent / entry.folder).resolve()
            if folder in found:
                continue
            source = open_artifact(folder) if folder.is_dir() else Artifact(folder, None)
            visit(source)
            found[folder] = source

    visit(open_artifact(path))
    return list(found.values())


def descendants(path: Path) -> list[Artifact]:
    """Every finished artifact of the same run that the one in `path` went into, oldest first; itself left out."""
    artifact = open_artifact(path)
    reached = {artifact.folder}
    found = []
    # An artifact is always older than what was made from it, so one pass from the oldest on is enough.
    for candidate in reversed(artifacts_in(artifact.folder.parent)):
        folder = candidate.folder.resolve()
        inputs = candidate.manifest.inputs.values() if candidate.manifest else ()
        if folder not in reached and any(
            (folder.parent / entry.folder).resolve() in reached for entry in inputs
        ):
            reached.add(folder)
            found.append(candidate)
    return found
