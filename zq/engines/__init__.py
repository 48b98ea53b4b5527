"""What an engine really does with a checkpoint: which kernel runs, what it ignores, what it refuses.

Facts, not guesses: read in the sources of the version that each engine's entry names, or run (docs/serving.md
says which). For another version they may be out of date, and zq says so.
"""

from zq.engines.judge import LAST, Restate, Verdict, judge
from zq.engines.served import Heads, Layer
from zq.engines.target import Target, parse
from zq.engines.vllm import plugin_refuses, plugin_takes

__all__ = [
    "LAST",
    "Heads",
    "Layer",
    "Restate",
    "Target",
    "Verdict",
    "judge",
    "parse",
    "plugin_refuses",
    "plugin_takes",
]
