"""YAML as a person writes it: plain types only, no aliases, no key twice, errors that name the line."""

from __future__ import annotations

from typing import Any

import yaml

from zq.errors import ZqError

PLAIN_TAGS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")


class Map(dict):
    """A mapping that remembers the line of each key."""

    lines: dict[str, int]
    line: int


RECIPE = "a recipe is a mapping with 'rules' and 'steps'; see `zq recipes show w4a8`"


def read(text: str, where: str, expected: str = RECIPE) -> Map:
    """A text as a mapping. Raises ZqError `where:line: what is wrong`, `expected` where it is none."""
    try:
        alias = next((e for e in yaml.parse(text, yaml.SafeLoader) if isinstance(e, yaml.AliasEvent)), None)
        if alias is not None:  # aliases can be recursive, or blow up when expanded
            raise ZqError(
                f"{where}:{alias.start_mark.line + 1}: alias '*{alias.anchor}' is not allowed; write it out"
            )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = _convert(node, where) if node is not None else None
    except RecursionError:
        raise ZqError(f"{where}:1: nested too deeply: {expected}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ZqError(f"{where}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from None
    if not isinstance(value, Map):
        raise ZqError(f"{where}:1: {expected}")
    return value


def _convert(node: yaml.Node, where: str) -> Any:
    if node.tag.removeprefix("tag:yaml.org,2002:") not in PLAIN_TAGS:
        raise ZqError(f"{where}:{node.start_mark.line + 1}: tag '{node.tag}' is not allowed; plain YAML only")
    if isinstance(node, yaml.MappingNode):
        result = Map()
        result.lines, result.line = {}, node.start_mark.line + 1
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in result:
                raise ZqError(f"{where}:{line}: key '{key}' is given twice; drop one")
            result[key] = _convert(value_node, where)
            result.lines[key] = line
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_convert(child, where) for child in node.value]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError):
        raise ZqError(f"{where}:{node.start_mark.line + 1}: cannot read value '{node.value}'") from None


_MISSING: Any = object()
_NAMES = {str: "text", int: "a whole number", bool: "true or false", list: "a list", Map: "a mapping"}


def typed(data: Map, key: str, kind: type, where: str, default: Any = _MISSING) -> Any:
    """data[key], of this type. Raises ZqError when it is another, or missing without a default."""
    if key not in data:
        if default is _MISSING:
            raise ZqError(f"{where}:{data.line}: '{key}' is missing")
        return default
    value = data[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ZqError(f"{where}:{data.lines[key]}: '{key}' must be {_NAMES[kind]}, not {value!r}")
    return value


def known(data: Map, keys: tuple[str, ...], where: str) -> None:
    """Raises ZqError for a key that is none of `keys`."""
    for key in data:
        if key not in keys:
            raise ZqError(
                f"{where}:{data.lines[key]}: key '{key}' is unknown; allowed here: {', '.join(keys)}"
            )
