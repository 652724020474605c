"""Identity: the fingerprint of a stage's work, and what differs between two of them."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pensar.base.config import canonical, complete, convert
from pensar.base.errors import RunError
from pensar.base.files import files_under, sha256, write_atomic
from pensar.base.manifest import MANIFEST, InputEntry, Manifest
from pensar.base.stage import Stage

LOGS = "logs"
"""Folder of a run for all that may differ between two identical runs."""
DIGESTS = "digests.json"
RACY_NANOSECONDS = 2_000_000_000
"""A file changed this recently may change again within one tick of its time stamp, so its digest is not kept."""
MAX_VALUE_TEXT = 60
UNSET = "unset"


def fingerprint(stage: Stage, inputs: Mapping[str, str], outside: Sequence[str] = ()) -> str:
    """What identifies the work: name, revision, configuration, and what goes in. There is no other function for it.

    `inputs` gives the fingerprint of every role, `outside` the digest of each path of `stage.outside` in order.
    Paths, defaults and everything of the runtime stay out. SHA-256, hexadecimal.
    """
    identity = {
        "stage": stage.name,
        "revision": stage.revision,
        "config": canonical(stage.config),
        "inputs": dict(inputs),
        "outside": list(outside),
    }
    return _hash(identity)


class Digests:
    """SHA-256 of files and folders, remembered in `cache` by size and time of change."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known: dict[str, tuple[int, int, str]] = {}
        self._changed = False
        if cache.is_file():
            try:
                self._known = msgspec.json.decode(cache.read_bytes(), type=dict[str, tuple[int, int, str]])
            except msgspec.DecodeError:
                # A cache that cannot be read costs time, nothing else.
                self._known = {}

    @classmethod
    def of_run(cls, root: Path) -> "Digests":
        """With the cache that a run's folder keeps."""
        return cls(root / LOGS / DIGESTS)

    def of(self, path: Path) -> str:
        """Digest of a file's content, or of a folder's file names and contents; RunError if there is none."""
        if path.is_dir():
            return _hash({name: self._of_file(file) for name, file in files_under(path).items()})
        if not path.exists():
            raise RunError(f"{path} does not exist; put it back, or name another path in the recipe")
        return self._of_file(path)

    def of_adopted(self, folder: Path) -> str:
        """Fingerprint of an adopted folder: its visible files, whatever made them."""
        visible = {
            name: self._of_file(file)
            for name, file in files_under(folder).items()
            if name != MANIFEST and not any(part.startswith(".") for part in Path(name).parts)
        }
        return _hash({"adopted": visible})

    def save(self) -> None:
        """Keeps what was learnt, if there is a folder for it."""
        if self._changed and self._cache.parent.is_dir():
            write_atomic(self._cache, msgspec.json.encode(self._known, order="sorted"))

    def _of_file(self, path: Path) -> str:
        stat = path.stat()
        key = str(path.absolute())
        known = self._known.get(key)
        if known is not None and known[:2] == (stat.st_size, stat.st_mtime_ns):
            return known[2]
        digest = sha256(path)
        if time.time_ns() - stat.st_mtime_ns > RACY_NANOSECONDS:
            self._known[key] = (stat.st_size, stat.st_mtime_ns, digest)
            self._changed = True
        return digest


def differences(
    stage: Stage, inputs: Mapping[str, InputEntry], outside: Mapping[str, str], earlier: Manifest
) -> list[str]:
    """Why `earlier`, an artifact of the same stage, is not this work: one short phrase a cause."""
    found = []
    if stage.revision != earlier.revision:
        found.append(f"revision {earlier.revision} -> {stage.revision}")
    found.extend(_config_differences(stage, earlier))
    for role in sorted(inputs.keys() | earlier.inputs.keys()):
        now, before = inputs.get(role), earlier.inputs.get(role)
        if now is None or before is None:
            found.append(f"input {role} {'removed' if now is None else 'added'}")
        elif now.stage != before.stage:
            found.append(f"input {role}: {before.stage} -> {now.stage}")
        elif now.fingerprint != before.fingerprint:
            found.append(f"input {role} changed")
    for path in sorted(outside.keys() | earlier.outside.keys()):
        if path not in outside or path not in earlier.outside:
            found.append(f"outside file {path} {'added' if path in outside else 'removed'}")
        elif outside[path] != earlier.outside[path]:
            found.append(f"outside file {path} changed")
    return found or ["written by another version of Pensar"]


def _config_differences(stage: Stage, earlier: Manifest) -> Iterator[str]:
    try:
        before = complete(convert(earlier.config, type(stage.config)))
        now = complete(stage.config)
    except msgspec.ValidationError:
        # The struct has changed since: compare what was written down.
        before, now = earlier.config, canonical(stage.config)
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for path in sorted(old.keys() | new.keys()):
        if old.get(path, UNSET) != new.get(path, UNSET):
            yield f"{path}: {_text(old.get(path, UNSET))} -> {_text(new.get(path, UNSET))}"


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, tree


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_TEXT else text[: MAX_VALUE_TEXT - 3] + "..."


def _hash(identity: Any) -> str:
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
