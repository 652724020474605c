"""YAML 1.2 with the core schema's scalars, read together with the line on which every value stands.

PyYAML resolves YAML 1.1 scalars: Norwegian `no` becomes False, `3e-4` stays text, `1:30` becomes 90. Here its
parser is used without its resolver.
"""

import math
import re
from typing import Any

import yaml

from pensar.base.errors import ConfigError

NULL = re.compile(r"(null|Null|NULL|~|)")
BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
NAN = re.compile(r"\.(nan|NaN|NAN)")
STRING_TAG = "tag:yaml.org,2002:str"
NON_SPECIFIC = {None, "!", STRING_TAG}


class _Loader(
    yaml.reader.Reader,
    yaml.scanner.Scanner,
    yaml.parser.Parser,
    yaml.composer.Composer,
    yaml.resolver.BaseResolver,
):
    """PyYAML's parser without implicit types: every plain scalar arrives as text."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        yaml.resolver.BaseResolver.__init__(self)


def parse(text: str, name: str) -> tuple[Any, dict[str, str]]:
    """The value of the one document in `text`, and `name:line` for every path in it (`$.a.b[0]`).

    Raises ConfigError for text that is not YAML, duplicate keys, keys that are not text, and foreign tags.
    """
    try:
        root = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    origins: dict[str, str] = {}
    value = None if root is None else _construct(root, "$", name, origins, ())
    return value, origins


def scalar(text: str) -> Any:
    """The value of a plain scalar by the core schema (YAML 1.2.2, section 10.3.2)."""
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    if INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if FLOAT.fullmatch(text):
        return float(text)
    if INFINITE.fullmatch(text):
        return -math.inf if text.startswith("-") else math.inf
    return math.nan if NAN.fullmatch(text) else text


def _construct(
    node: yaml.Node, path: str, name: str, origins: dict[str, str], above: tuple[yaml.Node, ...]
) -> Any:
    where = f"{name}:{node.start_mark.line + 1}"
    origins[path] = where
    if node in above:
        raise ConfigError(f"{where}: {path} contains itself through an alias; write the value out")
    above = (*above, node)
    if isinstance(node, yaml.ScalarNode):
        return _scalar_node(node, where)
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(item, f"{path}[{index}]", name, origins, above)
            for index, item in enumerate(node.value)
        ]
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = f"{name}:{key_node.start_mark.line + 1}"
        # A key is a name wherever this project writes one, so `no:` and `1:` are the texts "no" and "1".
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{line}: a key of {path} is a list or a mapping; keys are plain text")
        key = str(key_node.value)
        if key in tree:
            raise ConfigError(f"{line}: key `{key}` stands twice in {path}; remove one")
        tree[key] = _construct(value_node, f"{path}.{key}", name, origins, above)
    return tree


def _scalar_node(node: yaml.ScalarNode, where: str) -> Any:
    # With the bare resolver an untagged node carries the string tag whether it was quoted or not.
    if node.tag not in NON_SPECIFIC:
        raise ConfigError(f"{where}: tag {node.tag} is not used here; write a plain value")
    return scalar(node.value) if node.style is None else node.value
