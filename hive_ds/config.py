"""The recipe as frozen dataclasses: every value that a run depends on, each with one owner.

`hive_ds.recipe` reads recipes from YAML into these classes and reports where each value came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RoutesConfig:
    """Which vision block feeds which LLM layer; the two lists are read pairwise and have one length."""

    vision_blocks: tuple[int, ...]
    """Vision blocks, counted from 1 (the index of Hugging Face's ``hidden_states``)."""
    language_layers: tuple[int, ...]
    """LLM decoder layers, counted from 0."""


@dataclass(frozen=True)
class ModelConfig:
    """The model's parts and how they are joined."""

    vision_encoder: str
    """Hugging Face name or local folder of the vision encoder."""
    language_model: str
    """Hugging Face name or local folder of the LLM."""
    routes: RoutesConfig
    qk_norm: str = "pre_rope"
    """``none``, ``pre_rope`` or ``post_rope`` (the paper's); an LLM with its own q/k norms keeps those."""
    rope: str = "2d"
    """Image positions: ``2d`` (row, column, time) or ``1d`` (one after another, as the paper's code)."""
    attention_backend: str = "auto"
    """Backend of hierarchical attention: ``auto``, ``triton`` or ``reference``."""
    gradient_checkpointing: bool = False
    """Recompute activations of encoder blocks and LLM layers in backward (non-reentrant)."""


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they become tokens."""

    train: str
    """Folder (or remote URL) of MDS shards."""
    validation: str | None = None
    """MDS folder of held-out samples for the validation loss."""
    text_validation: str | None = None
    """MDS folder of text-only samples: does the LLM forget?"""
    template: str = "plain"
    """``plain`` (image, caption, end of sequence) or ``chat`` (the tokenizer's chat template)."""
    image_position: str = "first"
    """Place of the image under ``plain``: ``first``, or ``after_bos`` (the published order)."""
    max_length: int = 2048
    """Text tokens of one sample at most; longer samples are cut at the end and counted."""
    shuffle: bool = True
    cache: str | None = None
    """Local folder that remote shards are copied to; unused for local data."""
    num_workers: int = 2
    """Loader processes per rank."""
    max_bad_share: float = 0.01
    """Share of unreadable samples at which training stops; each is logged and replaced until then."""


@dataclass(frozen=True)
class StageConfig:
    """One training stage's numbers. What a stage trains stands in `hive_ds.stages`."""

    lr: float
    """Peak learning rate of every trained group that `group_lr` does not name."""
    global_batch_size: int
    """Samples of one optimizer step over all ranks and accumulation steps."""
    micro_batch_size: int
    """Samples of one forward pass on one rank."""
    epochs: float = 1.0
    steps: int | None = None
    """Optimizer steps; overrides ``epochs``."""
    group_lr: dict[str, float] = field(default_factory=dict)
    """Peak learning rate by group name (`hive_ds.stages`); 0 freezes the group."""
    vision_layer_decay: float = 1.0
    """Factor on the learning rate from one encoder block to the one below it; 1 switches it off."""
    min_lr_ratio: float = 0.0
    """Floor of the cosine as a share of the peak."""
    warmup_ratio: float = 0.03
    """Share of the steps spent in linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """AdamW's decay; never on norms and biases."""
    clip: float = 1.0
    """Largest global gradient norm."""


@dataclass(frozen=True)
class TrainingConfig:
    """What all stages of a run share."""

    seed: int = 0
    precision: str = "bf16"
    """``bf16`` or ``fp32``."""
    ds_config: str = "zero3"
    """ZeRO policy: a name from ``ds_configs/`` or the path of a JSON file."""
    validation_interval: int = 0
    """Steps between validation losses; 0 means at the end only."""
    validation_batches: int = 8
    """Micro-batches per rank of one validation."""
    checkpoint_interval: int = 0
    """Steps between checkpoints for resuming; 0 means none before the end."""
    log_interval: int = 1
    max_skipped_steps: int = 5
    """Steps in a row with a non-finite gradient before the run stops."""
    tensorboard: bool = False
    wandb: bool = False


@dataclass(frozen=True)
class Recipe:
    """A whole run: models, data and every stage."""

    name: str
    description: str
    model: ModelConfig
    data: DataConfig
    stages: dict[str, StageConfig]
    """By stage name: ``connector_pretraining``, ``modality_adaptation``, ``vision_finetuning``."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
