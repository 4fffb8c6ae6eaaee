"""Configuration of a HIVE model, as stored in its folder's ``config.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from hive_ds.errors import HiveError
from hive_ds.kernels import QK_NORMS
from hive_ds.model.positions import ROPES

PLACE = ("subfolder", "revision", "cache_dir", "force_download", "local_files_only", "token")
"""Arguments of ``from_pretrained`` that say where the files are."""
CHOICES = {"qk_norm": QK_NORMS, "rope": ROPES, "image_kv": ("shared", "own")}


class HiveConfig(PretrainedConfig):
    """Two model configs and how they are joined.

    Attributes:
        vision_config: config of the vision tower.
        text_config: config of the LLM.
        vision_blocks, language_layers: the routes, read pairwise; blocks count from 1, layers from 0.
        qk_norm: norm on queries and keys of routed layers whose LLM has none of its own.
        rope: ``"2d"`` or ``"1d"`` positions of image patches.
        image_kv: ``"shared"``, image keys through the LLM layer's k_proj and v_proj (stage 1); ``"own"``, through
            image_k_proj and image_v_proj.
        attention_backend: backend of `hierarchical_attention` at routed layers; a matter of the machine, not of the
            weights.
        text_attention_backend: the same of un-routed layers.
    """

    model_type = "hive"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (transformers' own form)

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_blocks: Sequence[int] = (),
        language_layers: Sequence[int] = (),
        qk_norm: str = "pre_rope",
        rope: str = "2d",
        image_kv: str = "shared",
        attention_backend: str = "auto",
        text_attention_backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        for name, value in (("qk_norm", qk_norm), ("rope", rope), ("image_kv", image_kv)):
            if value not in CHOICES[name]:
                raise HiveError(f"{name} is {value!r}; it must be one of {', '.join(CHOICES[name])}")
        self.vision_config = _as_config(vision_config, "siglip_vision_model")
        self.text_config = _as_config(text_config, "llama")
        self.vision_blocks, self.language_layers = list(vision_blocks), list(language_layers)
        self.qk_norm, self.rope, self.image_kv = qk_norm, rope, image_kv
        self.attention_backend, self.text_attention_backend = attention_backend, text_attention_backend
        kwargs["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        # None, the default, would reset the attention that both given configs have already settled on.
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = {}
        super().__init__(**kwargs)


def config_to_load(name: Any, keywords: dict[str, Any]) -> HiveConfig:
    """The config that ``from_pretrained`` of a model takes, given its name and its other arguments."""
    config = keywords.get("config")
    if isinstance(config, HiveConfig):
        return config
    where = {place: keywords[place] for place in PLACE if place in keywords}
    return HiveConfig.from_pretrained(config or name, **where)


def _as_config(config: PretrainedConfig | dict[str, Any] | None, default_type: str) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    values = dict(config or {})
    return AutoConfig.for_model(values.pop("model_type", default_type), **values)
