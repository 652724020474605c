"""`pensar show`: an artifact with its lineage both ways, counts, configuration, files and times."""

import json as jsonlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pensar.base.errors import ConfigError, DataError
from pensar.base.files import files_under
from pensar.base.lineage import ancestors, descendants, open_artifact
from pensar.base.manifest import Artifact, Manifest, artifacts_in, damage
from pensar.cli.options import Flag, Json
from pensar.cli.screen import Screen, counts_text
from pensar.report.numbers import count, duration, multiple, plural, short, significant, size


def show(
    path: Path,
    /,
    *,
    verify: Flag = False,
    step: int | None = None,
    parameters: float | None = None,
    tokens: float | None = None,
    json: Json = False,
) -> None:
    """Show an artifact: what it came from and went into, counts, configuration, files and times.

    Of a run's folder it lists the artifacts.

    Parameters
    ----------
    path
        Folder of an artifact, a link to one, or a run's folder.
    verify
        Compare the digest of every file.
    step
        Of a pre-training stage: list the documents that this step learned from.
    parameters
        Of a scaling sweep: say the learning rate and batch for a model of so many parameters without embeddings.
    tokens
        With --parameters: the tokens that it will learn from.
    """
    with Screen(json) as screen:
        artifact = open_artifact(path)
        if step is not None:
            _show_step(screen, artifact, step)
            return
        if parameters is not None or tokens is not None:
            _show_prediction(screen, artifact.folder, parameters, tokens)
            return
        listed = artifacts_in(artifact.folder)
        if artifact.manifest is not None:
            _show_artifact(screen, artifact, artifact.manifest, verify)
        elif listed:
            _show_run(screen, artifact.folder, listed)
        else:
            _show_foreign(screen, artifact.folder)


def _show_artifact(screen: Screen, artifact: Artifact, manifest: Manifest, verify: bool) -> None:
    before, after = ancestors(artifact.folder), descendants(artifact.folder)
    wrong = damage(artifact.folder, manifest, digests=verify)
    times = manifest.timings
    screen.line(str(artifact.folder))
    screen.line(f"stage {manifest.stage}, revision {manifest.revision}, fingerprint {manifest.fingerprint}")
    checked = "sizes and digests" if verify else "sizes"
    screen.line(f"files: {f'DAMAGED: {wrong}' if wrong else f'whole ({checked} compared)'}")
    screen.line(
        f"made {times.finished} in {duration(times.seconds)}, {duration(times.cpu_seconds)} of processor, "
        f"{size(times.peak_memory_bytes)} on {plural(times.ranks, 'process', 'processes')}"
        + (", resumed" if times.resumed else "")
    )
    screen.line("versions: " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    _show_tree(screen, "counts", manifest.counts)
    _show_tree(screen, "configuration (defaults omitted)", manifest.config)
    _show_lineage(screen, "made from, first to last", before)
    for name, digest in manifest.outside.items():
        screen.line(f"  {name} (outside, SHA-256 {digest[:12]})")
    _show_lineage(screen, "went into", after)
    screen.line("files:")
    rows = [(f"  {name}", size(entry.bytes), entry.sha256[:12]) for name, entry in manifest.files.items()]
    screen.table(("  name", "size", "SHA-256"), rows, right=(1,))
    screen.result(
        {
            "folder": str(artifact.folder),
            "manifest": manifest,
            "damage": wrong,
            "ancestors": [_reference(item) for item in before],
            "descendants": [_reference(item) for item in after],
        }
    )


def _show_step(screen: Screen, artifact: Artifact, step: int) -> None:
    from pensar.base.config import convert
    from pensar.train.pretrain import PretrainConfig, documents_of_step

    manifest = artifact.manifest
    if manifest is None or "mixture" not in manifest.config or "shards" not in manifest.inputs:
        raise DataError(
            f"{artifact.folder} is no pre-training stage; only they learn from documents step by step. "
            "pensar show of it names those it came from"
        )
    shards = artifact.folder.parent / manifest.inputs["shards"].folder
    shown = documents_of_step(convert(manifest.config, PretrainConfig), shards, artifact.folder, step)
    screen.table(
        ("row", "document", "source"), [(str(row), name, source) for row, name, source in shown], right=(0,)
    )
    screen.result({"folder": str(artifact.folder), "step": step, "documents": [s._asdict() for s in shown]})


def _show_prediction(screen: Screen, folder: Path, parameters: float | None, tokens: float | None) -> None:
    from pensar.train.powerlaw import Interval
    from pensar.train.prediction import hyperparameters, read_prediction

    if parameters is None or tokens is None or min(parameters, tokens) < 1:
        raise ConfigError(
            f"--parameters {parameters} and --tokens {tokens}: give both, as in --parameters 4e5 --tokens 1e6"
        )
    prediction = read_prediction(folder)
    found = hyperparameters(prediction, round(parameters), round(tokens))

    def row(
        name: str, value: Interval | None, why: str, shown: Callable[[float], str]
    ) -> tuple[str, str, str]:
        if value is None:
            return name, "", f"no law: {why}"
        ends = [shown(end) for end in (value.low, value.high) if end is not None]
        return name, shown(value.value), " to ".join(ends)

    optimizer = "Muon" if prediction.muon else "AdamW"
    adamw = Interval(found.adamw_rate) if found.adamw_rate is not None else None
    rows = [
        row(f"learning rate, {optimizer}", found.rate, prediction.rate_why, significant),
        *([row("learning rate, AdamW", adamw, prediction.rate_why, significant)] if prediction.muon else []),
        row("batch, tokens", found.batch_tokens, prediction.batch_why, count),
        row("loss, nats a token", found.loss, prediction.loss_why, significant),
    ]
    screen.table(
        (f"{short(parameters)} parameters, {short(tokens)} tokens", "value", "95% interval"), rows, right=(1,)
    )
    if found.beyond > 1:
        screen.line(f"beyond the sweep: {multiple(found.beyond)}")
    screen.result({"folder": str(folder), "prediction": found})


def _show_run(screen: Screen, folder: Path, listed: Sequence[Artifact]) -> None:
    rows = []
    for artifact in reversed(listed):
        manifest = artifact.manifest
        assert manifest is not None
        times = manifest.timings
        rows.append(
            (artifact.name, times.finished[:19], duration(times.seconds), counts_text(manifest.counts))
        )
    screen.table(("artifact", "finished (UTC)", "time", "counts"), rows, right=(2,))
    screen.result({"folder": str(folder), "artifacts": [_reference(item) for item in reversed(listed)]})


def _show_foreign(screen: Screen, folder: Path) -> None:
    files = files_under(folder)
    if not files:
        raise DataError(f"{folder} is empty: nothing to show; give the folder of an artifact or of a run")
    screen.line(
        f"{folder}: no manifest, so it was not made by a run; a recipe can start from it with `adopt`"
    )
    sizes = {name: path.stat().st_size for name, path in files.items()}
    screen.table(("name", "size"), [(name, size(num)) for name, num in sizes.items()], right=(1,))
    screen.result({"folder": str(folder), "manifest": None, "files": sizes})


def _show_tree(screen: Screen, title: str, tree: dict[str, Any]) -> None:
    screen.line(f"{title}:" if tree else f"{title}: none")
    for name, value in tree.items():
        screen.line(
            f"  {name}: {value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False)}"
        )


def _show_lineage(screen: Screen, title: str, artifacts: Sequence[Artifact]) -> None:
    screen.line(f"{title}:" if artifacts else f"{title}: nothing")
    for artifact in artifacts:
        state = "" if artifact.folder.is_dir() else " (gone)"
        counts = counts_text(artifact.manifest.counts) if artifact.manifest else ""
        screen.line(f"  {artifact.name}{state}" + (f": {counts}" if counts else ""))


def _reference(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "folder": str(artifact.folder),
        "stage": manifest.stage if manifest else None,
        "fingerprint": manifest.fingerprint if manifest else None,
        "counts": manifest.counts if manifest else None,
        "timings": manifest.timings if manifest else None,
    }
