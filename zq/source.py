"""From what the user typed to a folder: a local checkpoint, a hub id, or `demo`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from zq.demo import demo_checkpoint
from zq.errors import ZqError

HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "README.md")
HUB_FILES += ("[0-9]_*/*",)  # the modules of sentence-transformers, whatever their files are called
# The same weights once more: in Meta's or Mistral's layout, for other runtimes, of earlier checkpoints.
NOT_HUB_FILES = ("consolidated*", "*/*.safetensors", "original/*", "onnx/*", "openvino/*", "metal/*")


def resolve(model: str, progress: Callable[[str], None] = lambda message: None) -> Path:
    """The folder of a model. A hub id is downloaded once into the hub's own cache (HF_HUB_OFFLINE holds).

    Raises ZqError when it is none of the three, or when the hub refuses.
    """
    if not model.strip():
        raise ZqError("the name of the model is empty; give a checkpoint folder, a hub id or demo")
    if model == "demo":
        return demo_checkpoint(progress)
    folder = Path(model).expanduser()
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise ZqError(f"cannot look for {folder}: {error.strerror}; check the path") from None
    if is_folder:
        if not (folder / "config.json").is_file():
            raise ZqError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
        return folder
    if exists and folder.suffix == ".gguf":
        raise ZqError(
            f"{folder} is a GGUF file, which zq writes but does not read; give the checkpoint it is from"
        )
    if exists:
        raise ZqError(f"{folder} is a file; give the folder that holds config.json and *.safetensors")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ZqError(
            f"there is no folder {model}; give a checkpoint folder, a hub id such as org/name, or demo"
        )
    return _download(model, progress)


def _download(model: str, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    progress(f"fetching {model} from the Hugging Face hub")
    try:
        return Path(
            snapshot_download(model, allow_patterns=list(HUB_FILES), ignore_patterns=list(NOT_HUB_FILES))
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        why = "it is not in the local cache, and the hub is offline or cannot be reached"
    except HfHubHTTPError as error:
        why = " ".join(str(error).split())[:160]
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
    raise ZqError(
        f"'{model}' is no local folder and could not be fetched from the hub: {why}; check the name"
    )
