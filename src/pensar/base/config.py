"""Configuration: frozen typed structs, read from YAML with exact error paths."""

import difflib
import enum
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pensar.base import yaml12
from pensar.base.errors import ConfigError

ERROR = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>\$.*)`)?", re.DOTALL)
STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
UNKNOWN = object()
EXTENDS = "extends"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Parent of every configuration struct; lives in the file of the code that it drives."""


C = TypeVar("C")


def load(path: Path, kind: type[C], overrides: Sequence[str] = ()) -> C:
    """Reads a YAML file into `kind`, after `a.b=value` overrides; raises ConfigError naming file, line and path.

    A file that says `extends: other.yaml` begins with the values of that file, which lies beside it.
    """
    tree, origins = _read(path, ())
    return _build(tree, origins, kind, str(path), overrides)


def parse(text: str, kind: type[C], name: str = "config", overrides: Sequence[str] = ()) -> C:
    """`load` for text that is already in memory; `name` stands for the file in errors."""
    tree, origins = yaml12.parse(text, name)
    return _build(tree, origins, kind, name, overrides)


def canonical(config: Any, path: str = "$") -> Any:
    """The plain JSON value that identifies a configuration: defaults omitted at every level, tags kept.

    Raises ConfigError for a value without a stable encoding (a function, NaN, bytes, an arbitrary object).
    """
    if config is None or (isinstance(config, bool | int | str) and not isinstance(config, enum.Enum)):
        return config
    if isinstance(config, float):
        if not math.isfinite(config):
            raise ConfigError(f"{path} is {config}: only finite numbers can identify a stage")
        return config
    if isinstance(config, enum.Enum):
        return canonical(config.value, path)
    if isinstance(config, Path):
        return config.as_posix()
    if isinstance(config, msgspec.Struct):
        return _canonical_struct(config, path)
    if isinstance(config, Mapping):
        if odd := [key for key in config if not isinstance(key, str)]:
            raise ConfigError(f"{path} has the key {odd[0]!r}: only text keys can identify a stage")
        return {key: canonical(config[key], f"{path}.{key}") for key in sorted(config)}
    if isinstance(config, list | tuple):
        return [canonical(item, f"{path}[{index}]") for index, item in enumerate(config)]
    if isinstance(config, set | frozenset):
        return sorted(
            (canonical(item, f"{path}{{}}") for item in config), key=lambda item: (str(type(item)), item)
        )
    raise ConfigError(
        f"{path} is {config!r} ({type(config).__name__}): it has no stable encoding, so it cannot identify a stage; "
        "use numbers, text, lists, mappings or a Config"
    )


def complete(config: Any) -> Any:
    """The whole configuration as plain JSON values, defaults included."""
    if isinstance(config, msgspec.Struct):
        return _tag(config) | {
            field.encode_name: complete(getattr(config, field.name))
            for field in msgspec.structs.fields(config)
        }
    if isinstance(config, Mapping):
        return {str(key): complete(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [complete(item) for item in config]
    return canonical(config)


def convert(tree: Any, kind: type[C]) -> C:
    """`canonical`'s value back as a `kind`; raises msgspec.ValidationError where it does not fit any more."""
    return msgspec.convert(tree, kind, dec_hook=_decode_hook)


def json_schema(kind: type) -> dict[str, Any]:
    """JSON schema of a configuration, for completion and checks in editors."""
    return msgspec.json.schema(kind, schema_hook=_schema_hook)


def nearest(name: str, valid: Sequence[str]) -> str:
    """`did you mean ...?` for a mistyped name, or the list of what is valid; for the end of an error."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean `{close[0]}`?"
    return "valid: " + ", ".join(sorted(valid)) if valid else "nothing is valid here"


def _canonical_struct(config: msgspec.Struct, path: str) -> dict[str, Any]:
    values = _tag(config)
    for field in msgspec.structs.fields(config):
        value = getattr(config, field.name)
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        # The type is compared too: True == 1 in Python, but they are two settings.
        if default is not msgspec.NODEFAULT and type(value) is type(default) and value == default:
            continue
        values[field.encode_name] = canonical(value, f"{path}.{field.encode_name}")
    return values


def _tag(config: msgspec.Struct) -> dict[str, Any]:
    info = config.__struct_config__
    return {info.tag_field: info.tag} if info.tag is not None and info.tag_field is not None else {}


def _override(tree: Any, override: str, origins: dict[str, str]) -> Any:
    key, equals, text = override.partition("=")
    name = f"--set {override}"
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise ConfigError(f"{name}: write it as key.path=value, such as `--set data.min_words=5`")
    value, value_origins = yaml12.parse(text, name)
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: the file holds no mapping to change")
    here: Any = tree
    path = "$"
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        if isinstance(here, list):
            if not step.isdigit() or int(step) >= len(here):
                raise ConfigError(f"{name}: {path} is a list of {len(here)}; `{step}` is no index in it")
            position: Any = int(step)
            path += f"[{step}]"
        else:
            position = step
            path += f".{step}"
        if last:
            here[position] = value
        elif isinstance(here, list) or (position in here and isinstance(here[position], dict | list)):
            here = here[position]
            if not isinstance(here, dict | list):
                raise ConfigError(f"{name}: {path} is {here!r}, which has no parts to set")
        else:
            here[position] = {}
            here = here[position]
        origins[path] = name
    for below in [known for known in origins if known.startswith((f"{path}.", f"{path}["))]:
        del origins[below]
    origins.update({path + below[1:]: name for below in value_origins})
    return tree


def _refuse_unknown_keys(tree: Any, kind: Any, path: str, name: str, origins: Mapping[str, str]) -> None:
    """Walks value and type together; stops where they part, which the conversion then reports."""
    inspect = msgspec.inspect
    if isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.UnionType):
        kind = _member(tree, kind)
    if isinstance(tree, dict) and isinstance(kind, inspect.StructType):
        fields = {field.encode_name: field.type for field in kind.fields}
        valid = [*fields, *([kind.tag_field] if kind.tag_field else [])]
        for key, value in tree.items():
            if key not in valid and kind.forbid_unknown_fields:
                where = _where(f"{path}.{key}", name, origins)
                raise ConfigError(f"{where}: unknown key {path}.{key}; {nearest(key, valid)}")
            if key in fields:
                _refuse_unknown_keys(value, fields[key], f"{path}.{key}", name, origins)
    elif isinstance(tree, dict) and isinstance(kind, inspect.DictType):
        for key, value in tree.items():
            _refuse_unknown_keys(value, kind.value_type, f"{path}.{key}", name, origins)
    elif isinstance(tree, list):
        item_type = getattr(kind, "item_type", None)
        item_types = getattr(kind, "item_types", [item_type] * len(tree))
        for index, (value, item) in enumerate(zip(tree, item_types, strict=False)):
            _refuse_unknown_keys(value, item, f"{path}[{index}]", name, origins)


def _build(tree: Any, origins: dict[str, str], kind: type[C], name: str, overrides: Sequence[str]) -> C:
    tree = {} if tree is None else tree
    for override in overrides:
        tree = _override(tree, override, origins)
    info = msgspec.inspect.type_info(kind)
    _refuse_unknown_keys(tree, info, "$", name, origins)
    try:
        return convert(_filled(tree, info, None), kind)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), tree, name, origins)) from None


def _read(path: Path, below: tuple[Path, ...]) -> tuple[Any, dict[str, str]]:
    """The tree of a file over that of the file it extends; `below` are the files that extend this one."""
    if path.resolve() in below:
        raise ConfigError(f"{below[-1]}: extends {path}, which extends it in turn; take one `extends` out")
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        asked = f", which {below[-1]} extends" if below else ""
        raise ConfigError(f"{path}: no such file{asked}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    tree, origins = yaml12.parse(text, str(path))
    if not isinstance(tree, dict) or EXTENDS not in tree:
        return tree, origins
    other = tree.pop(EXTENDS)
    if not isinstance(other, str):
        raise ConfigError(f"{origins[f'$.{EXTENDS}']}: extends is {other!r}; give the name of one YAML file")
    under, origins_under = _read(path.parent / other, (*below, path.resolve()))
    return _over(under, tree), origins_under | origins


def _over(under: Any, tree: Any) -> Any:
    """Mappings key by key, everything else replaced."""
    if isinstance(under, dict) and isinstance(tree, dict):
        return under | {key: _over(under.get(key), value) for key, value in tree.items()}
    return tree


def _filled(tree: Any, kind: Any, default: Any) -> Any:
    """The tree with what it leaves out of a struct taken from the field's own default, where that is a struct.

    A field `rl: RL = RL(queries="general")` that a file sets to `{steps: 5}` still has the queries of its default,
    not those of every RL.
    """
    inspect = msgspec.inspect
    if isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.UnionType):
        kind = _member(tree, kind)
    if isinstance(tree, dict) and isinstance(kind, inspect.StructType):
        known = default if type(default) is kind.cls else None
        filled = dict(tree)
        for field in kind.fields:
            below = _default(field) if known is None else getattr(known, field.name)
            if field.encode_name in tree:
                filled[field.encode_name] = _filled(tree[field.encode_name], field.type, below)
            elif known is not None:
                filled[field.encode_name] = complete(below)
        return filled
    if isinstance(tree, dict) and isinstance(kind, inspect.DictType):
        return {key: _filled(value, kind.value_type, None) for key, value in tree.items()}
    if isinstance(tree, list):
        item_types = getattr(kind, "item_types", [getattr(kind, "item_type", None)] * len(tree))
        items = [_filled(value, item, None) for value, item in zip(tree, item_types, strict=False)]
        return items + tree[len(items) :]
    return tree


def _default(field: Any) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def _member(tree: Any, union: Any) -> Any:
    """The member of a union that the value's shape and tag choose, or None."""
    inspect = msgspec.inspect
    members = [kind.type if isinstance(kind, inspect.Metadata) else kind for kind in union.types]
    if isinstance(tree, list):
        return next(
            (kind for kind in members if hasattr(kind, "item_type") or hasattr(kind, "item_types")), None
        )
    if not isinstance(tree, dict):
        return None
    structs = [kind for kind in members if isinstance(kind, inspect.StructType)]
    for kind in structs:
        if kind.tag_field is None or tree.get(kind.tag_field) == kind.tag:
            return kind
    return next((kind for kind in members if isinstance(kind, inspect.DictType)), None)


def _explain(error: str, tree: Any, name: str, origins: Mapping[str, str]) -> str:
    match = ERROR.fullmatch(error)
    what, path = (match["what"], match["path"] or "$") if match else (error, "$")
    where = _where(path, name, origins)
    value = _value_at(tree, path)
    if not what.startswith(("Expected", "Invalid")) or value is UNKNOWN or isinstance(value, dict | list):
        return f"{where}: {path}: {what[:1].lower()}{what[1:]}"
    expected = re.sub(r", got `\w+`$", "", what[:1].lower() + what[1:])
    return f"{where}: {path} is {value!r}: {expected}{_remedy(value, what)}"


def _remedy(value: Any, what: str) -> str:
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9][0-9_]*", value) and "_" in value:
        return f"; YAML numbers have no underscores, write {value.replace('_', '')}"
    if isinstance(value, float) and value.is_integer() and "`int`" in what:
        return f"; write {int(value)}"
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off") and "`bool`" in what:
        return "; write true or false"
    return ""


def _where(path: str, name: str, origins: Mapping[str, str]) -> str:
    """File and line of the value, or of the nearest thing around it that the file holds."""
    while path and path not in origins:
        path = path[: max(path.rfind("."), path.rfind("["))] if "." in path or "[" in path else ""
    return origins.get(path, name)


def _value_at(tree: Any, path: str) -> Any:
    for step in STEP.finditer(path):
        try:
            tree = tree[step[1]] if step[1] is not None else tree[int(step[2])]
        except (KeyError, IndexError, TypeError):
            return UNKNOWN
    return tree


def _decode_hook(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"a configuration cannot hold {kind.__name__}")


def _schema_hook(kind: type) -> dict[str, Any]:
    if kind is Path:
        return {"type": "string", "format": "path"}
    raise NotImplementedError(f"a configuration cannot hold {kind.__name__}")
