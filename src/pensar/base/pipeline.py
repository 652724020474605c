"""The pipeline: which stages of a recipe are done, stale or new and why, and the loop that brings them up to date.

An artifact is done when its folder `<stage>-<fingerprint>` stands in the run's folder, nothing else says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pensar.base.attempt import DRAFT_SUFFIX, attempt, set_aside
from pensar.base.config import nearest
from pensar.base.errors import ConfigError, RunError
from pensar.base.identity import LOGS, Digests, differences, fingerprint
from pensar.base.lock import locked
from pensar.base.manifest import (
    Artifact,
    InputEntry,
    Manifest,
    artifacts_in,
    damage,
    folder_name,
    read_manifest,
)
from pensar.base.stage import Runtime, Stage

FORCED = "asked for with --from"
Status = Literal["done", "stale", "new", "adopted", "unused"]


@dataclass(frozen=True)
class Planned:
    """A stage with the verdict on it."""

    stage: Stage
    fingerprint: str
    status: Status
    """`unused`: only adopted stages would have needed it."""
    reason: str
    folder: Path
    """Where its artifact is or will be."""
    inputs: Mapping[str, InputEntry] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.stage.name


@dataclass(frozen=True)
class Outcome:
    """A stage that is up to date now."""

    planned: Planned
    manifest: Manifest | None
    """None for an adopted folder without one."""
    ran: bool
    """Whether it had to be done in this run."""


@dataclass(frozen=True)
class Choice:
    """Which part of a recipe is asked for."""

    until: str | None = None
    """The last stage, in the recipe's order."""
    from_: str | None = None
    """This stage and all after it are done anew even where they are done."""
    only: tuple[str, ...] = ()
    """These stages and what they need; empty: all."""
    adopt: Mapping[str, Path] = field(default_factory=dict)
    """Stages whose artifact is an existing folder."""
    verify: bool = False
    """Read every file of what is done and compare its digest, not its size alone."""


ALL = Choice()


def plan(stages: Sequence[Stage], root: Path, choice: Choice = ALL) -> list[Planned]:
    """The verdict on every stage asked for, in order, before anything runs.

    Raises ConfigError for stages that do not fit together and RunError for outside files that do not exist.
    """
    _check(stages, choice)
    asked = _asked(stages, choice)
    used = _used(asked, choice)
    names = [stage.name for stage in stages]
    anew = set(names[names.index(choice.from_) :]) if choice.from_ else set()
    earlier = artifacts_in(root)
    digests = Digests.of_run(root)
    planned: dict[str, Planned] = {}
    for stage in asked:
        if stage.name in choice.adopt:
            planned[stage.name] = _adopted(stage, choice.adopt[stage.name], digests)
        elif stage.name not in used:
            reason = "only adopted stages would need it"
            planned[stage.name] = Planned(stage, "", "unused", reason, root / stage.name)
        else:
            item = _identified(stage, root, planned, digests)
            planned[stage.name] = _judged(item, earlier, stage.name in anew, choice.verify)
    digests.save()
    return list(planned.values())


def run(
    stages: Sequence[Stage],
    root: Path,
    runtime: Runtime,
    choice: Choice = ALL,
    links: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Brings every stage asked for up to date; `execute` to the end."""
    return list(execute(stages, root, runtime, choice, links))


def execute(
    stages: Sequence[Stage],
    root: Path,
    runtime: Runtime,
    choice: Choice = ALL,
    links: Mapping[str, str] | None = None,
) -> Iterator[Outcome]:
    """Does what is not done, stage by stage, and yields each one as it is up to date.

    `links` names symbolic links in `root` and the stage whose artifact each shows, such as {"model": "general"}.
    Interrupted at any moment, the same call goes on from the drafts. Nothing is deleted: what is done anew stays
    beside it under another name. Raises RunError when the folder is in use, the disk is full or an input vanishes.
    """
    with locked(root):
        (root / LOGS).mkdir(exist_ok=True)
        todo = plan(stages, root, choice)
        for planned in todo:
            if planned.status in ("stale", "new"):
                # All of them at once, so that a run cut short here does not take the rest for done.
                forced = planned.reason == FORCED
                set_aside(planned.folder, "old" if forced else "damaged")
                if forced:
                    set_aside(planned.folder.with_name(planned.folder.name + DRAFT_SUFFIX), "old")
        for planned in todo:
            if planned.status == "unused":
                continue
            ran = planned.status in ("stale", "new")
            if ran:
                logs = root / LOGS / planned.folder.name
                manifest: Manifest | None = attempt(
                    planned.stage,
                    planned.fingerprint,
                    planned.inputs,
                    planned.outside,
                    planned.folder,
                    replace(runtime, logs=logs),
                )
            else:
                manifest = _manifest_of(planned)
            for link, stage in (links or {}).items():
                if stage == planned.name:
                    _point(root / link, planned.folder)
            yield Outcome(planned, manifest, ran)


def _check(stages: Sequence[Stage], choice: Choice) -> None:
    names = [stage.name for stage in stages]
    for index, stage in enumerate(stages):
        if stage.name in names[:index]:
            raise ConfigError(f"two stages are called `{stage.name}`; names must differ")
        for role, source in stage.inputs.items():
            if source not in names[:index]:
                raise ConfigError(
                    f"input {role} of stage `{stage.name}` is `{source}`, which is no earlier stage; "
                    f"{nearest(source, names[:index])}"
                )
    wanted = [*choice.only, *choice.adopt, *filter(None, (choice.until, choice.from_))]
    for name in wanted:
        if name not in names:
            raise ConfigError(f"no stage is called `{name}`; {nearest(name, names)}")


def _asked(stages: Sequence[Stage], choice: Choice) -> list[Stage]:
    names = [stage.name for stage in stages]
    asked = list(stages[: names.index(choice.until) + 1]) if choice.until else list(stages)
    if not choice.only:
        return asked
    needed = _closure(asked, set(choice.only), choice)
    return [stage for stage in asked if stage.name in needed]


def _used(asked: Sequence[Stage], choice: Choice) -> set[str]:
    """The stages that something needs once adopted ones need nothing."""
    consumed = {source for stage in asked for source in stage.inputs.values()}
    return _closure(asked, {stage.name for stage in asked} - consumed, choice)


def _closure(stages: Sequence[Stage], wanted: set[str], choice: Choice) -> set[str]:
    needed = set(wanted)
    for stage in reversed(stages):
        if stage.name in needed and stage.name not in choice.adopt:
            needed.update(stage.inputs.values())
    return needed


def _adopted(stage: Stage, folder: Path, digests: Digests) -> Planned:
    if not folder.is_dir():
        raise ConfigError(
            f"adopt.{stage.name}: {folder} is no folder; give the folder of the artifact to start from"
        )
    folder = folder.resolve()
    return Planned(stage, digests.of_adopted(folder), "adopted", str(folder), folder)


def _identified(stage: Stage, root: Path, before: Mapping[str, Planned], digests: Digests) -> Planned:
    inputs = {}
    for role, source in stage.inputs.items():
        item = before[source]
        folder = str(item.folder) if item.status == "adopted" else item.folder.name
        inputs[role] = InputEntry(stage=source, fingerprint=item.fingerprint, folder=folder)
    outside = {str(path): digests.of(path) for path in stage.outside}
    own = fingerprint(
        stage, {role: entry.fingerprint for role, entry in inputs.items()}, list(outside.values())
    )
    return Planned(stage, own, "new", "", root / folder_name(stage.name, own), inputs, outside)


def _judged(item: Planned, earlier: Sequence[Artifact], anew: bool, verify: bool) -> Planned:
    same = next((artifact for artifact in earlier if artifact.folder == item.folder), None)
    if same is not None and same.manifest is not None:
        wrong = damage(same.folder, same.manifest, digests=verify)
        if wrong is None and not anew:
            return replace(item, status="done", reason="")
        return replace(item, status="stale", reason=FORCED if anew else f"damaged: {wrong}")
    if item.folder.exists():
        return replace(item, status="stale", reason="damaged: manifest.json cannot be read")
    if item.folder.with_name(item.folder.name + DRAFT_SUFFIX).exists():
        return replace(
            item,
            status="stale" if anew else "new",
            reason=FORCED if anew else "begun: goes on from its draft",
        )
    for artifact in earlier:
        if artifact.manifest is not None and artifact.manifest.stage == item.name:
            causes = differences(item.stage, item.inputs, item.outside, artifact.manifest)
            return replace(item, status="stale", reason="; ".join(causes))
    return item


def _manifest_of(planned: Planned) -> Manifest | None:
    if planned.status == "adopted" and not (planned.folder / "manifest.json").exists():
        return None
    return read_manifest(planned.folder)


def _point(link: Path, folder: Path) -> None:
    """Makes `link` show `folder`, in one step."""
    if link.exists() and not link.is_symlink():
        raise RunError(f"{link} is in the way of the link to {folder.name}; move it elsewhere")
    target = folder.name if folder.parent == link.parent else str(folder)
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)
