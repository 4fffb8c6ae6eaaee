"""The frozen encoder under probe, from any folder that holds one, and the hashes that say which one it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, PreTrainedModel

from hive_ds.data.images import auto_image_processor
from hive_ds.data.preprocess import Preprocessor, make_preprocessor
from hive_ds.errors import require_one_of
from hive_ds.export import model_folder
from hive_ds.export.source import load_tower
from hive_ds.model.configuration import HiveConfig
from hive_ds.model.identity import weights_sha256
from hive_ds.model.loading import load_vision_encoder
from hive_ds.model.vision import vision_blocks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TRAINED = (HiveConfig.model_type, LlavaConfig.model_type)

NOT_COMPUTED = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""What a config says of the file and not of the computation."""


@dataclass(frozen=True)
class EncoderInfo:
    """What identifies an encoder in results.

    ``name`` heads its column of the table; ``source`` is where it came from; ``dtype`` is what it computes in.
    ``weights_sha256`` is of the tower alone: a HIVE model and the encoder exported from it have the same.
    """

    name: str
    source: str
    model_class: str
    num_blocks: int
    dtype: str
    weights_sha256: str
    exact_sha256: str
    """The same of the values to the last bit; two encoders that differ below bf16 share the other."""
    config_sha256: str
    """Of what else its computation depends on: heads, activation, epsilon and the like."""
    processor_class: str
    processor_sha256: str


@dataclass(frozen=True)
class ProbeEncoder:
    """A frozen vision tower in eval mode, its preprocessing, and what identifies both."""

    info: EncoderInfo
    tower: PreTrainedModel
    preprocess: Preprocessor


def load_encoder(
    source: str | Path, name: str | None = None, *, device: str | torch.device | None = None, dtype: str = "fp32"
) -> ProbeEncoder:
    """The encoder of a stock folder or Hugging Face name, of a trained model's folder, or of a run's last stage.

    Args:
        source: where it is.
        name: of its column; by default the last part of ``source``.
        device: by default a GPU where there is one.
        dtype: of weights and computation, one of `DTYPES`.

    Raises:
        HiveError: there is no encoder, its weights are incomplete, or its image processor does not load.
    """
    folder = Path(source).expanduser()
    where = str(model_folder(folder)) if folder.is_dir() else str(source)
    tower = load_tower(Path(where)).encoder if _holds_trained_model(where) else load_vision_encoder(where)
    processor = auto_image_processor(where)
    return make_encoder(tower, processor, name or folder.name, source=str(source), device=device, dtype=dtype)


def make_encoder(
    tower: PreTrainedModel,
    image_processor: Any,
    name: str,
    *,
    source: str = "memory",
    device: str | torch.device | None = None,
    dtype: str = "fp32",
) -> ProbeEncoder:
    """An encoder that is in memory already; it is moved to ``device``, frozen and left in eval mode.

    Args:
        tower: a vision encoder of one of `hive_ds.model.vision.FAMILIES`.
        image_processor: its own.
        name: in tables.
        source: where it comes from, for the record.
        device: default: a GPU if there is one.
        dtype: that it computes in: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        HiveError: another ``dtype``.
    """
    require_one_of("dtype", dtype, DTYPES)
    processor_class = type(image_processor).__name__
    info = EncoderInfo(
        name=name,
        source=source,
        model_class=type(tower).__name__,
        num_blocks=len(vision_blocks(tower)),
        dtype=dtype,
        weights_sha256=weights_sha256(tower.state_dict().items()),
        exact_sha256=weights_sha256(tower.state_dict().items(), torch.float32),
        config_sha256=_dict_sha256({k: v for k, v in tower.config.to_dict().items() if k not in NOT_COMPUTED}),
        processor_class=processor_class,
        processor_sha256=_dict_sha256({**image_processor.to_dict(), "class": processor_class}),
    )
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    frozen = tower.to(target, DTYPES[dtype]).eval().requires_grad_(False)
    return ProbeEncoder(info, frozen, make_preprocessor(image_processor))


def _dict_sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _holds_trained_model(where: str) -> bool:
    """Whether a HIVE or a LLaVA-style model lies there, whose encoder is a part of it."""
    config = Path(where) / "config.json"
    if not config.is_file():
        return False
    try:
        return json.loads(config.read_text()).get("model_type") in TRAINED
    except (ValueError, AttributeError):
        return False  # load_vision_encoder says what is wrong with it
