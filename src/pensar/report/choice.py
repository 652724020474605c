"""Which of a run's artifacts a report is about: one a stage, all of one piece."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pensar.base.lineage import ancestors
from pensar.base.manifest import Manifest, artifacts_in

RESULTS = "results.json"
"""What the evaluation writes; it marks the end of a run."""


@dataclass(frozen=True)
class Chosen:
    """An artifact that is shown."""

    folder: Path
    manifest: Manifest

    @property
    def stage(self) -> str:
        return self.manifest.stage


def choose(run: Path, shown: Sequence[Path] = ()) -> tuple[list[Chosen], list[str]]:
    """The artifacts to show, in the order of the work, and the stages of which newer or other ones are left out.

    `shown` names the folders of a recipe's own artifacts where the caller knows them. Otherwise it is what went into
    the last evaluation, or, before there is one, into the newest artifact; and whatever else was made from these.
    """
    found = [
        Chosen(artifact.folder, artifact.manifest)
        for artifact in artifacts_in(run)
        if artifact.manifest is not None
    ]
    if not found:
        return [], []
    if shown:
        names = {folder.name for folder in shown}
        chosen = {one.stage: one for one in found if one.folder.name in names}
        return _in_order(chosen), []
    base = next((one for one in found if (one.folder / RESULTS).is_file()), found[0])
    chosen = _of_one_piece(found, base)
    newer = {
        one.stage: None for one in reversed(found[: found.index(base)]) if one is not chosen.get(one.stage)
    }
    absent = {one.stage: None for one in reversed(found) if one.stage not in chosen}
    return _in_order(chosen), list(newer | absent)


def _of_one_piece(found: Sequence[Chosen], base: Chosen) -> dict[str, Chosen]:
    """What went into `base`, and of every other stage the newest artifact that was made from these alone."""
    by_folder = {one.folder.resolve(): one for one in found}
    before = [by_folder[item.folder] for item in ancestors(base.folder) if item.folder in by_folder]
    fixed = {one.stage: one for one in [*before, base]}
    chosen = dict(fixed)
    # An artifact is always older than what was made from it, so one pass from the oldest on reaches all.
    for one in reversed(found):
        if one.stage not in fixed and _made_from(one, chosen):
            chosen[one.stage] = one
    while broken := [
        one.stage for one in chosen.values() if one.stage not in fixed and not _made_from(one, chosen)
    ]:
        for stage in broken:
            del chosen[stage]
    return chosen


def _made_from(one: Chosen, chosen: Mapping[str, Chosen]) -> bool:
    """Whether every input is shown too, or was adopted from outside the run."""
    folders = {other.folder.name for other in chosen.values()}
    return all(entry.folder in folders or "/" in entry.folder for entry in one.manifest.inputs.values())


def _in_order(chosen: Mapping[str, Chosen]) -> list[Chosen]:
    """Each stage after those it was made from, otherwise in the order in which they were done."""
    waiting = sorted(chosen.values(), key=lambda one: (one.manifest.timings.finished, one.folder.name))
    names = {one.folder.name for one in waiting}
    placed: dict[str, Chosen] = {}
    while waiting:
        ready = next(
            (
                one
                for one in waiting
                if all(
                    entry.folder in placed for entry in one.manifest.inputs.values() if entry.folder in names
                )
            ),
            waiting[0],
        )
        placed[ready.folder.name] = ready
        waiting.remove(ready)
    return list(placed.values())
