"""A checkpoint as a step that works on the whole model makes the rest of a run see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from zq.checkpoint.index import CheckpointIndex
from zq.checkpoint.reader import Read


@dataclass(frozen=True, kw_only=True)
class View:
    """The float model that is quantized. Without such a step: the checkpoint itself.

    config    the transformers config of the model that comes out
    index     what the checkpoint would hold: dtypes and shapes of all tensors; some may be in no file
    read      the tensors, made when they are asked for, one at a time
    becomes   parameter name -> what was done to it, in words, for the plan
    settings  entries of config.json that change
    facts     entries of zq_report.json
    notes     what the user should know
    memory    bytes that reading takes beside the tensors
    """

    config: PretrainedConfig
    index: CheckpointIndex
    read: Read
    becomes: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    memory: int = 0
