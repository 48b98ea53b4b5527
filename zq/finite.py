"""Numbers that JSON has, in the place of those that it has not."""

from __future__ import annotations

import math
from typing import Any


def finite(data: Any) -> Any:
    """Mappings and lists as they are, with None for every NaN and infinity in them."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
