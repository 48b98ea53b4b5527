"""Fields of `quantization_config`, which other tools write and people edit: errors name them as it does."""

from __future__ import annotations

import json
from typing import Any, TypeGuard

from zq.errors import ZqError

ROOT = "quantization_config"


def wrong(path: str, args: dict[str, Any], key: str, allowed: str) -> ZqError:
    """That the file has something else than `allowed` at `path`.`key`."""
    found = shown(args[key]) if key in args else "missing"
    return ZqError(f"{path}.{key} is {found}; zq reads {allowed} there, quantize or download again")


def shown(value: Any) -> str:
    """A value as the file has it, not too much of it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_size(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number from 1 on; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def strings(path: str, args: dict[str, Any], key: str) -> list[str]:
    """A list of names; empty where there is none. Raises ZqError for anything else."""
    listed = args.get(key)
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise wrong(path, args, key, "a list of names")
    return listed
