"""Pick the description and the transformers class for a config; refuse what zq cannot do, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zq.errors import ZqError
from zq.models.arch import Arch
from zq.models.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _supported(model_type: object, where: str) -> Arch:
    arch = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if arch is None:
        raise ZqError(
            f"{where}: model_type {model_type!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}; use a model of one of these types"
        )
    return arch


def load_config(folder: Path) -> PretrainedConfig:
    """Read config.json of a local model folder. Never runs code from the folder.

    Raises ZqError when it is missing, is no JSON object, has an unsupported model_type, or holds
    values that the transformers config class rejects.
    """
    where = str(Path(folder) / "config.json")
    try:
        raw = json.loads(Path(where).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ZqError(
            f"{where}: cannot be read as JSON ({one_line(error)}); "
            "give a folder that holds a Hugging Face checkpoint"
        ) from error
    if not isinstance(raw, dict):
        raise ZqError(f"{where}: holds a {type(raw).__name__}, not a JSON object; download it again")
    _supported(raw.get("model_type"), where)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a bad value
        raise ZqError(f"{where}: transformers rejects it ({one_line(error)}); correct the value") from error


def find_family(folder: Path) -> Arch:
    """The description of a local checkpoint's architecture, quantized or not. Raises ZqError."""
    return _supported(load_config(folder).model_type, str(Path(folder) / "config.json"))


def find_arch(config: PretrainedConfig, where: str) -> Arch:
    """The description of this config's architecture.

    Args:
        config: a transformers config; where: how to name it in an error (its path).

    Raises ZqError when the model type is unknown, the model is already quantized, or it needs
    code that ships with the checkpoint.
    """
    arch = _supported(getattr(config, "model_type", None), where)
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        raise ZqError(
            f"{where}: this model is already quantized ({_method(quantization)}); "
            "only floating-point checkpoints can be quantized; start from the original model"
        )
    name = next(iter(getattr(config, "architectures", None) or []), None)
    if getattr(config, "auto_map", None) and _transformers_class(name) is None:
        raise ZqError(
            f"{where}: architecture {name!r} needs code that ships with the checkpoint (auto_map); "
            "zq runs only classes of transformers; use a model that needs no remote code"
        )
    return arch


def position_limit(config: PretrainedConfig, arch: Arch) -> int | None:
    """The longest sequence that a model has positions for; None with alibi (BLOOM)."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and arch.positions_after_pad:
        limit -= config.pad_token_id + 1
    return limit


def find_positions(folder: Path) -> int | None:
    """`position_limit` of a local checkpoint. Raises ZqError."""
    config = load_config(folder)
    return position_limit(config, _supported(config.model_type, str(Path(folder) / "config.json")))


def model_class(config: PretrainedConfig) -> type:
    """The transformers class that holds this checkpoint.

    `config.architectures[0]` when transformers has it and it takes this kind of config, else the
    class that AutoModelForCausalLM (decoders) or AutoModel (encoders) would choose.
    """
    named = _transformers_class(next(iter(getattr(config, "architectures", None) or []), None))
    if named is not None and isinstance(config, getattr(named, "config_class", None) or ()):
        return named
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    arch = _supported(getattr(config, "model_type", None), "config")
    mapping = MODEL_MAPPING if arch.encoder else MODEL_FOR_CAUSAL_LM_MAPPING
    found: Any = mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def _transformers_class(name: object) -> type | None:
    import transformers

    found = getattr(transformers, name, None) if isinstance(name, str) else None
    usable = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if usable else None


def _method(quantization: Any) -> str:
    read = quantization.get if isinstance(quantization, dict) else vars(quantization).get
    method = read("quant_method")
    return str(getattr(method, "value", method) or "unknown method")


def one_line(error: Exception) -> str:
    """The text of a foreign error on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]


def load_tokenizer(folder: Path, otherwise: str = "") -> Any:
    """The checkpoint's own tokenizer. Raises ZqError when there is none that transformers can read;
    `otherwise` is what else the user can do."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a missing or foreign tokenizer
        raise ZqError(
            f"{folder} has no tokenizer that transformers can read ({one_line(error)}); add it{otherwise}"
        ) from None
