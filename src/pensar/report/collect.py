"""From a run's folder to a report: manifests, metrics, timings and the evaluation's results, brought together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pensar.base.attempt import DRAFT_SUFFIX
from pensar.base.errors import DataError
from pensar.base.files import read_jsonl
from pensar.base.identity import LOGS
from pensar.base.manifest import FOLDER as FOLDER_NAME
from pensar.evaluate.statistics import share
from pensar.report.choice import RESULTS, Chosen, choose
from pensar.report.compare import compared, headline, with_changes
from pensar.report.contents import (
    Draft,
    ExamplesRow,
    ExpertShares,
    FunnelRow,
    LanguageRow,
    Languages,
    LearnedBudgets,
    Report,
    Results,
    Scaling,
    StageRow,
    Target,
    Training,
    WayPoint,
)
from pensar.report.records import Record, read_record, training
from pensar.train.prediction import FILE as PREDICTION
from pensar.train.prediction import Prediction, hyperparameters, ladder, read_prediction

EXPERTS = "experts.json"
"""What a stage writes that trained a mixture of experts."""
BUDGETS = "budget_curve.jsonl"
"""What the stage writes that learned thinking budgets."""
OUTSIDE = {"und": "undetermined", "zxx": "program code"}
"""Codes of ISO 639 that name no human language."""


def collect(run: Path, shown: Sequence[Path] = ()) -> Report:
    """The report of a run as far as it has got; `shown` are the artifacts that it is about, where the caller knows.

    Raises DataError when what a stage wrote cannot be read.
    """
    artifacts, left_out = choose(run, shown)
    records = {one.stage: read_record(one.folder, run / LOGS / one.folder.name) for one in artifacts}
    stages = [_stage_row(one, records[one.stage]) for one in artifacts]
    drafts, draft_trainings = _drafts(run, set(records))
    trainings = [
        training(stage, record) for stage, record in records.items() if record.rows
    ] + draft_trainings
    results = _results(artifacts)
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
        left_out=left_out,
        funnel=funnel,
        examples=_examples(artifacts),
        languages=_languages(artifacts),
        scaling=_scaling(artifacts),
        training=trainings,
        experts=_experts(artifacts),
        learned_budgets=_learned_budgets(artifacts),
        evaluated=results is not None,
        versions=_versions(artifacts),
        **{field: getattr(known, field) for field in Results.__struct_fields__},
    )


def _stage_row(one: Chosen, record: Record) -> StageRow:
    manifest = one.manifest
    tokens = record.tokens() or _whole(manifest.counts.get("tokens"))
    seconds = record.seconds() or manifest.timings.seconds
    return StageRow(
        name=manifest.stage,
        folder=one.folder.name,
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
    )


def _drafts(run: Path, done: set[str]) -> tuple[list[Draft], list[Training]]:
    """What has begun of the stages that have nothing to show yet."""
    drafts, trainings = [], []
    for folder in sorted(run.glob(f"*{DRAFT_SUFFIX}")):
        name = FOLDER_NAME.fullmatch(folder.name.removesuffix(DRAFT_SUFFIX))
        if name is None or not folder.is_dir() or name["stage"] in done:
            continue
        record = read_record(folder, run / LOGS / folder.name.removesuffix(DRAFT_SUFFIX))
        drafts.append(Draft(name=name["stage"], steps=len(record.rows)))
        if record.rows:
            trainings.append(training(name["stage"], record, finished=False))
    return drafts, trainings


def _results(artifacts: Sequence[Chosen]) -> Results | None:
    """What the evaluation wrote; None before there is any."""
    evaluation = next((one for one in reversed(artifacts) if (one.folder / RESULTS).is_file()), None)
    if evaluation is None:
        return None
    path = evaluation.folder / RESULTS
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except msgspec.DecodeError as error:
        raise DataError(
            f"{path} does not hold the evaluation's results ({error}); "
            f"make it anew with `pensar run RECIPE --from {evaluation.stage}`"
        ) from None


def _scaling(artifacts: Sequence[Chosen]) -> Scaling | None:
    """The sweep, and what its laws say of the run's own models; None where there is none."""
    swept = next((one for one in artifacts if (one.folder / PREDICTION).is_file()), None)
    if swept is None:
        return None
    found = read_prediction(swept.folder)
    targets = [target for one in artifacts if (target := _target(one, found)) is not None]
    return Scaling(prediction=found, targets=targets, ladder=ladder(found))


def _target(one: Chosen, found: Prediction) -> Target | None:
    """The laws' values for a stage that begins a model; None for any other."""
    config = one.manifest.config
    if not {"shape", "tokens", "mixture"} <= config.keys():
        return None
    from pensar.base.config import convert
    from pensar.model.count import parameters
    from pensar.train.pretrain import Shape

    size = parameters(convert(config["shape"], Shape).model(1)).active_non_embedding
    return Target(stage=one.stage, values=hyperparameters(found, size, config["tokens"]))


def _experts(artifacts: Sequence[Chosen]) -> list[ExpertShares]:
    """Of every stage that trained a mixture of experts."""
    found = []
    for one in artifacts:
        path = one.folder / EXPERTS
        if not path.is_file():
            continue
        try:
            row = msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) | {"stage": one.stage}
            found.append(msgspec.convert(row, ExpertShares))
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise DataError(
                f"{path} does not hold shares of experts ({error}); make it anew with "
                f"`pensar run RECIPE --from {one.stage}`"
            ) from None
    return found


def _learned_budgets(artifacts: Sequence[Chosen]) -> LearnedBudgets | None:
    """With shares and their intervals of what the stage counted; None where no stage learned budgets."""
    learned = next((one for one in artifacts if (one.folder / BUDGETS).is_file()), None)
    if learned is None:
        return None
    points = []
    for point in read_jsonl(learned.folder / BUDGETS, WayPoint):
        found = share(point.right, point.questions)
        scores = {"accuracy": found.score, "low": found.low, "high": found.high}
        points.append(msgspec.structs.replace(point, **scores))
    return LearnedBudgets(stage=learned.stage, points=points) if points else None


def _funnel(artifacts: Sequence[Chosen]) -> list[FunnelRow]:
    rows = []
    for one in artifacts:
        counts = one.manifest.counts
        if "documents_in" in counts and "documents_out" in counts:
            rows.append(
                FunnelRow(
                    stage=one.stage,
                    documents_in=counts["documents_in"],
                    documents_out=counts["documents_out"],
                    bytes_in=counts.get("bytes_in", 0),
                    bytes_out=counts.get("bytes_out", 0),
                    dropped=_most_first(counts.get("dropped", {})),
                )
            )
    return rows


def _examples(artifacts: Sequence[Chosen]) -> list[ExamplesRow]:
    rows = []
    for one in artifacts:
        counts = one.manifest.counts
        if "examples" not in counts:
            continue
        dropped = counts.get("dropped", {})
        if rejected := counts.get("rejected"):
            dropped = {**dropped, "rejected": rejected}
        rows.append(
            ExamplesRow(
                stage=one.stage,
                queries=_whole(counts.get("queries")),
                examples=counts["examples"],
                dropped=_most_first(dropped),
            )
        )
    return rows


def _languages(artifacts: Sequence[Chosen]) -> Languages | None:
    counted = next((one for one in reversed(artifacts) if one.manifest.counts.get("languages")), None)
    if counted is None:
        return None
    from pensar.data.language import language_table

    documents: dict[str, int] = _most_first(counted.manifest.counts["languages"])
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
            LanguageRow(code=code, name=OUTSIDE.get(code, code), documents=num)
            for code, num in documents.items()
            if code not in names
        ],
    )


def _versions(artifacts: Sequence[Chosen]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for one in artifacts:
        for name, version in one.manifest.versions.items():
            found.setdefault(name, {})[version] = None
    return {name: ", ".join(versions) for name, versions in sorted(found.items())}


def _most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
