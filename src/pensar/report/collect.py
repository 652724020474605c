"""From a run's folder to a report: manifests, metrics, timings and the evaluation's results, brought together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pensar.base.attempt import DRAFT_SUFFIX
from pensar.base.errors import DataError
from pensar.base.identity import LOGS
from pensar.base.lineage import ancestors
from pensar.base.manifest import FOLDER as FOLDER_NAME
from pensar.base.manifest import Artifact, Manifest, artifacts_in
from pensar.report.compare import compared, headline, with_changes
from pensar.report.contents import (
    Draft,
    ExamplesRow,
    FunnelRow,
    LanguageRow,
    Languages,
    Report,
    Results,
    StageRow,
    Training,
)
from pensar.report.records import Record, read_record, training

RESULTS = "results.json"
OWN_STAGE = "report"
"""An earlier report is no part of what a report tells of."""
UNDETERMINED = "und"


def collect(run: Path, drawn_in: Path | None = None) -> Report:
    """The report of a run as far as it has got; `drawn_in` is the folder that is being written, which is left out."""
    artifacts = newest(run)
    records = {
        manifest.stage: read_record(folder, run / LOGS / folder.name) for folder, manifest in artifacts
    }
    stages = [
        _stage_row(folder, manifest, artifacts, records[manifest.stage]) for folder, manifest in artifacts
    ]
    drafts, draft_trainings = _drafts(run, drawn_in)
    trainings = [
        training(stage, record) for stage, record in records.items() if record.rows
    ] + draft_trainings
    results = _results([folder for folder, _ in artifacts])
    known = results or Results()
    table = with_changes(known.stage_table, [row.name for row in stages])
    methods = compared(known.rl_against_distillation, {row.name: row.seconds for row in stages})
    known = msgspec.structs.replace(known, stage_table=table, rl_against_distillation=methods)
    funnel = _funnel(artifacts)
    return Report(
        recipe=run.name,
        finished=max((row.finished for row in stages), default=""),
        headline=headline(known, stages, trainings, funnel),
        stages=stages,
        unfinished=drafts,
        funnel=funnel,
        examples=_examples(artifacts),
        languages=_languages(artifacts),
        training=trainings,
        evaluated=results is not None,
        versions=_versions(artifacts),
        **{field: getattr(known, field) for field in Results.__struct_fields__},
    )


def newest(run: Path) -> list[tuple[Path, Manifest]]:
    """One artifact a stage, in the order of the work.

    What went into the newest artifact of all comes first; every other stage is shown by its own newest one.
    """
    found = [item for item in artifacts_in(run) if item.manifest and item.manifest.stage != OWN_STAGE]
    chosen: dict[str, Artifact] = {}
    for artifact in [*found[:1], *(ancestors(found[0].folder) if found else []), *found]:
        if artifact.manifest is not None and artifact.folder.parent == run:
            chosen.setdefault(artifact.manifest.stage, artifact)
    pairs = [(item.folder, item.manifest) for item in chosen.values() if item.manifest is not None]
    # An artifact is always older than what was made from it.
    return sorted(pairs, key=lambda pair: (pair[1].timings.finished, pair[0].name))


def _stage_row(
    folder: Path, manifest: Manifest, artifacts: Sequence[tuple[Path, Manifest]], record: Record
) -> StageRow:
    shown = {other.stage: path.name for path, other in artifacts}
    tokens = record.tokens() or _whole(manifest.counts.get("tokens"))
    seconds = record.seconds() or manifest.timings.seconds
    outdated = [
        role
        for role, entry in manifest.inputs.items()
        if entry.stage in shown and "/" not in entry.folder and entry.folder != shown[entry.stage]
    ]
    return StageRow(
        name=manifest.stage,
        folder=folder.name,
        fingerprint=manifest.fingerprint,
        revision=manifest.revision,
        seconds=manifest.timings.seconds,
        cpu_seconds=manifest.timings.cpu_seconds,
        ranks=manifest.timings.ranks,
        peak_memory_bytes=manifest.timings.peak_memory_bytes,
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 3) if tokens and seconds else None,
        resumed=manifest.timings.resumed,
        finished=manifest.timings.finished,
        inputs={role: entry.folder for role, entry in manifest.inputs.items()},
        outside=manifest.outside,
        config=manifest.config,
        counts=manifest.counts,
        outdated=outdated,
    )


def _drafts(run: Path, drawn_in: Path | None) -> tuple[list[Draft], list[Training]]:
    drafts, trainings = [], []
    own = drawn_in.resolve() if drawn_in is not None else None
    for folder in sorted(run.glob(f"*{DRAFT_SUFFIX}")):
        name = FOLDER_NAME.fullmatch(folder.name.removesuffix(DRAFT_SUFFIX))
        if name is None or not folder.is_dir() or folder.resolve() == own or name["stage"] == OWN_STAGE:
            continue
        record = read_record(folder, run / LOGS / folder.name.removesuffix(DRAFT_SUFFIX))
        drafts.append(Draft(name=name["stage"], steps=len(record.rows)))
        if record.rows:
            trainings.append(training(name["stage"], record, finished=False))
    return drafts, trainings


def _results(folders: Sequence[Path]) -> Results | None:
    """What the latest evaluation wrote; None before there is any."""
    path = next((folder / RESULTS for folder in reversed(folders) if (folder / RESULTS).is_file()), None)
    if path is None:
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except msgspec.DecodeError as error:
        raise DataError(
            f"{path} does not hold the evaluation's results ({error}); run the stage `{path.parent.name}` again"
        ) from None


def _funnel(artifacts: Sequence[tuple[Path, Manifest]]) -> list[FunnelRow]:
    rows = []
    for _, manifest in artifacts:
        counts = manifest.counts
        if "documents_in" in counts and "documents_out" in counts:
            rows.append(
                FunnelRow(
                    stage=manifest.stage,
                    documents_in=counts["documents_in"],
                    documents_out=counts["documents_out"],
                    bytes_in=counts.get("bytes_in", 0),
                    bytes_out=counts.get("bytes_out", 0),
                    dropped=_most_first(counts.get("dropped", {})),
                )
            )
    return rows


def _examples(artifacts: Sequence[tuple[Path, Manifest]]) -> list[ExamplesRow]:
    rows = []
    for _, manifest in artifacts:
        counts = manifest.counts
        if "examples" not in counts:
            continue
        dropped = counts.get("dropped", {})
        if rejected := counts.get("rejected"):
            dropped = {**dropped, "rejected": rejected}
        rows.append(
            ExamplesRow(
                stage=manifest.stage,
                queries=_whole(counts.get("queries")),
                examples=counts["examples"],
                dropped=_most_first(dropped),
            )
        )
    return rows


def _languages(artifacts: Sequence[tuple[Path, Manifest]]) -> Languages | None:
    counted = next(
        (manifest for _, manifest in reversed(artifacts) if manifest.counts.get("languages")), None
    )
    if counted is None or not isinstance(counted.counts["languages"], dict):
        return None
    from pensar.data.language import language_table

    documents: dict[str, int] = _most_first(counted.counts["languages"])
    names = {language.code: language.name for language in language_table()}
    return Languages(
        stage=counted.stage,
        table_size=len(names),
        present=[
            LanguageRow(code=code, name=names[code], documents=num)
            for code, num in documents.items()
            if code in names
        ],
        missing=[LanguageRow(code=code, name=name) for code, name in names.items() if code not in documents],
        other=[
            LanguageRow(code=code, name="undetermined" if code == UNDETERMINED else code, documents=num)
            for code, num in documents.items()
            if code not in names
        ],
    )


def _versions(artifacts: Sequence[tuple[Path, Manifest]]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for _, manifest in artifacts:
        for name, version in manifest.versions.items():
            found.setdefault(name, {})[version] = None
    return {name: ", ".join(versions) for name, versions in sorted(found.items())}


def _most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
