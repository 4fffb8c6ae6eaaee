"""The recipe as frozen dataclasses: every value that a run depends on, each with one owner.

`hive_ds.recipe` reads recipes from YAML into these classes and reports where each value came from. What a single value
may be stands in its annotation (`hive_ds.checks`); what binds several values, in their class's ``__post_init__``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from hive_ds.checks import (
    BETA,
    BYTES,
    FACTOR,
    FOLDERS,
    NOT_EMPTY,
    NOT_NEGATIVE,
    NOT_ZERO,
    POSITIVE,
    RISING,
    SHARE,
    Check,
    at_least,
    every,
    every_value,
    keys_from,
    one_of,
    or_word,
)
from hive_ds.errors import HiveError
from hive_ds.stages import STAGES, STAGES_BY_KIND, VLM_STAGES, Stage, stage_called

# Written out here, for the code that has them imports torch; tests/unit/test_choices.py compares.
ATTENTION = ("auto", "triton", "sdpa", "reference")
"""Attention of routed layers (`hive_ds.kernels.BACKENDS`)."""
TEXT_ATTENTION = (*ATTENTION, "torch_flash", "flash_attention_2")
"""Attention of un-routed layers: those and `hive_ds.model.flash.FLASH_BACKENDS`."""

STAGE_NAMES = tuple(stage.name for stage in STAGES)
"""The stages that a recipe may describe."""

GROUPS = tuple(dict.fromkeys(name for stages in STAGES_BY_KIND.values() for stage in stages for name in stage.trains))
"""Parameter groups that some stage of some kind of model trains."""

SEED = Check("from 0 to 2**63 - 1", lambda value: 0 <= value < 1 << 63)
"""What torch and numpy both take."""


@dataclass(frozen=True)
class RoutesConfig:
    """Which vision block feeds which LLM layer; the two lists are read pairwise and have one length."""

    vision_blocks: Annotated[tuple[int, ...], every(at_least(1))]
    """Vision blocks, counted from 1 (the index of Hugging Face's ``hidden_states``)."""
    language_layers: Annotated[tuple[int, ...], every(at_least(0))]
    """LLM decoder layers, counted from 0."""

    def __post_init__(self) -> None:
        if len(self.vision_blocks) != len(self.language_layers):
            raise HiveError(
                f"{len(self.vision_blocks)} vision_blocks but {len(self.language_layers)} language_layers;"
                " expected two lists of one length, read pairwise"
            )
        pairs = Counter(zip(self.vision_blocks, self.language_layers, strict=True))
        twice = [f"block {block} -> layer {layer}" for (block, layer), count in pairs.items() if count > 1]
        if twice:
            raise HiveError(f"{', '.join(twice)} is listed more than once; expected each route once")


@dataclass(frozen=True)
class ModelConfig:
    """The model's parts and how they are joined."""

    vision_encoder: Annotated[str, NOT_EMPTY]
    """Hugging Face name or local folder of the vision encoder."""
    language_model: Annotated[str, NOT_EMPTY]
    """Hugging Face name or local folder of the LLM."""
    routes: RoutesConfig | None = None
    """For kind ``hive``, which needs them: two lists, or a number of routes, spread evenly over both models."""
    kind: Annotated[str, one_of(*STAGES_BY_KIND)] = "hive"
    """``hive``, or ``cascaded``: features of one block go through an MLP to the LLM's input (the paper's SA)."""
    feature_block: Annotated[int, NOT_ZERO] = -2
    """Vision block that a cascaded model takes, from 1 or, negative, from the end: -2 is the penultimate."""
    qk_norm: Annotated[str, one_of("none", "pre_rope", "post_rope")] = "pre_rope"
    """``none``, ``pre_rope`` or ``post_rope`` (the paper's); an LLM with its own q/k norms keeps those."""
    rope: Annotated[str, one_of("2d", "1d")] = "2d"
    """Image positions: ``2d`` (row, column, time) or ``1d`` (one after another, as the paper's code)."""
    attention_backend: Annotated[str, one_of(*ATTENTION)] = "auto"
    """Attention of routed layers: ``auto`` (``triton`` on a GPU, ``sdpa`` elsewhere) or one by name."""
    text_attention_backend: Annotated[str, one_of(*TEXT_ATTENTION)] = "auto"
    """Attention of un-routed layers: as above, torch's own flash attention, or the package flash-attn."""
    vision_attention: Annotated[str, one_of("sdpa", "flash_attention_2", "eager")] = "sdpa"
    """Attention of the vision encoder, as transformers names it."""
    language_loss: Annotated[str, one_of("auto", "liger", "plain")] = "auto"
    """Head and cross-entropy: ``auto`` (``liger``, fused, on a GPU where it is installed, else ``plain``)."""
    gradient_checkpointing: bool = False
    """Recompute activations of encoder blocks and LLM layers in backward (non-reentrant)."""

    def __post_init__(self) -> None:
        if self.kind == "hive" and self.routes is None:
            raise HiveError("routes is missing; a model of kind hive expects vision_blocks and language_layers")
        if self.kind == "cascaded" and self.routes is not None:
            raise HiveError("routes are given, but a model of kind cascaded has none; expected null")


@dataclass(frozen=True)
class VlmConfig:
    """The cascaded model of stages 4 and 5, which judges the encoder; attention and checkpointing are ``model``'s."""

    language_model: Annotated[str, NOT_EMPTY]
    """Hugging Face name or local folder of the chat LLM."""
    vision_encoder: Annotated[str | None, NOT_EMPTY] = None
    """Hugging Face name or local folder; null: what stages 1 to 3 have made, exported to RUN/encoder."""
    feature_block: Annotated[int, NOT_ZERO] = -2
    """As ``model.feature_block``."""


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they become tokens."""

    train: Annotated[str | dict[str, float], FOLDERS]
    """Folder (or remote URL) of MDS shards, or a mapping from several to their weights (shares of all samples)."""
    validation: Annotated[str | None, NOT_EMPTY] = None
    """MDS folder of held-out samples for the validation loss."""
    text_validation: Annotated[str | None, NOT_EMPTY] = None
    """MDS folder of text-only samples: does the LLM forget?"""
    questions: Annotated[str | None, NOT_EMPTY] = None
    """Local MDS folder of questions about images, each with its answer, that the model answers at every validation; the
    share of exact answers is logged."""
    template: Annotated[str, one_of("plain", "chat")] = "plain"
    """``plain`` (image, caption, end of sequence) or ``chat`` (the tokenizer's chat template)."""
    image_position: Annotated[str, one_of("first", "after_bos")] = "first"
    """Place of the image under ``plain``: ``first``, or ``after_bos`` (the published order)."""
    image_aspect: Annotated[str, one_of("square", "pad")] = "square"
    """``square``: as the encoder's own processor has it (stretched or cropped); ``pad``: padded in its mean colour."""
    max_length: Annotated[int, at_least(2)] = 2048
    """Text tokens of one sample at most; longer samples are cut at the end and counted."""
    shuffle: bool = True
    """Another order of the samples in every epoch; false: that of the folders."""
    cache: Annotated[str | None, NOT_EMPTY] = None
    """Local folder that remote shards are copied to, each remote folder's to one of its own; unused for local data."""
    cache_limit: Annotated[str | None, BYTES] = None
    """Size of the cache, such as ``100gb``, above which shards read longest ago are removed; for remote data only."""
    balance: bool = False
    """Deal the samples of each global batch to the ranks so that texts and images are shared out evenly."""
    num_workers: Annotated[int, NOT_NEGATIVE] = 2
    """Loader processes per rank."""
    max_bad_share: Annotated[float, SHARE] = 0.01
    """Training stops when more than this share of all ranks' samples since the stage's start was unreadable (of 1000
    samples at least, and three standard deviations more for chance); until then each is logged and replaced."""


@dataclass(frozen=True)
class StageConfig:
    """One training stage's numbers. What a stage trains stands in `hive_ds.stages`."""

    lr: Annotated[float, POSITIVE]
    """Peak learning rate of every trained group that `group_lr` does not name."""
    global_batch_size: Annotated[int, at_least(1)]
    """Samples of one optimizer step over all ranks and accumulation steps."""
    micro_batch_size: Annotated[int | Literal["auto"], or_word(at_least(1), "auto")]
    """Samples of one forward pass on one rank, at most: where it does not divide a rank's share of the global batch,
    the next smaller number that does. ``auto``: the largest that fits the device's memory, found when the run starts.
    The weights do not depend on it."""
    epochs: Annotated[float, POSITIVE] = 1.0
    """Passes over the data; fractions are allowed."""
    steps: Annotated[int | None, at_least(1)] = None
    """Optimizer steps; overrides ``epochs``."""
    group_lr: Annotated[dict[str, float], replace(every_value(NOT_NEGATIVE), choices=GROUPS)] = field(
        default_factory=dict
    )
    """Peak learning rate by group name (`hive_ds.stages`); 0 freezes the group."""
    vision_layer_decay: Annotated[float, FACTOR] = 1.0
    """Factor on the learning rate from one encoder block to the one below it; 1 switches it off."""
    min_lr_ratio: Annotated[float, SHARE] = 0.0
    """Floor of the cosine as a share of the peak."""
    warmup_ratio: Annotated[float, SHARE] = 0.03
    """Share of the steps spent in linear warm-up."""
    betas: Annotated[tuple[float, float], every(BETA)] = (0.9, 0.999)
    """AdamW's, of the mean gradient and of its square."""
    eps: Annotated[float, POSITIVE] = 1e-8
    """AdamW's, added to the root of the mean square."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """AdamW's decay; never on norms and biases."""
    clip: Annotated[float, POSITIVE] = 1.0
    """Largest global gradient norm."""
    data: DataConfig | None = None
    """Data of this stage alone; what is not written here comes from the recipe's ``data``. null: all of it does."""

    @property
    def micro_batch(self) -> int:
        """``micro_batch_size`` of a stage whose ranks are known (`hive_ds.training.global_batch.fit_micro_batch`)."""
        assert isinstance(self.micro_batch_size, int)
        return self.micro_batch_size


@dataclass(frozen=True)
class TrainingConfig:
    """What all stages of a run share."""

    seed: Annotated[int, SEED] = 0
    """Of fresh weights, the order of the data and everything else that is drawn."""
    precision: Annotated[str, one_of("bf16", "fp32")] = "bf16"
    """``bf16`` or ``fp32``."""
    ds_config: Annotated[str, NOT_EMPTY] = "zero3"
    """ZeRO policy: a name from ``ds_configs/`` or the path of a JSON file."""
    validation_interval: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between validation losses; 0 means at the end only."""
    validation_samples: Annotated[int, at_least(1)] = 1024
    """Samples of one validation loss, over all ranks: the first ones of each held-out folder, or all that it has."""
    maps_interval: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between gradient norms of the encoder's blocks and maps of one held-out sample; 0 means none."""
    profile: Annotated[tuple[int, int] | None, RISING] = None
    """First and last optimizer step, from 1, that rank 0 profiles: a trace, and where the time goes; null: none."""
    checkpoint_interval: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between checkpoints for resuming; 0 means none before the end."""
    keep_checkpoints: Annotated[int, at_least(1)] = 2
    """How many of the newest checkpoints are kept."""
    keep_every: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between checkpoints that are kept for good; 0 means none."""
    stop_on_failed_save: bool = False
    """Whether a checkpoint that cannot be written (disk full) ends the run; else it goes on with the last good one."""
    log_interval: Annotated[int, at_least(1)] = 1
    """Steps between the ``train`` lines of ``metrics.jsonl``."""
    max_skipped_steps: Annotated[int, at_least(1)] = 5
    """Steps in a row with a non-finite gradient before the run stops."""
    hang_timeout: Annotated[float, NOT_NEGATIVE] = 1800
    """Seconds without progress after which every rank writes where it is and the run ends; 0 switches that off."""
    compile: bool = False
    """Whether encoder blocks, projectors and LLM layers run through torch.compile."""
    tensorboard: bool = False
    """Write TensorBoard's files to ``RUN/stageN/tensorboard`` too."""
    wandb: bool = False
    """Log to Weights & Biases too (extra ``wandb``)."""


@dataclass(frozen=True)
class Recipe:
    """A whole run: models, data and every stage."""

    name: Annotated[str, NOT_EMPTY]
    """Of the recipe; runs are logged under it."""
    description: str
    """One line, which ``hive-ds recipe list`` prints."""
    model: ModelConfig
    data: DataConfig
    stages: Annotated[dict[str, StageConfig], keys_from(*STAGE_NAMES)]
    """By stage name (`hive_ds.stages`)."""
    vlm: VlmConfig | None = None
    """Needed by stages 4 and 5."""
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        for stage in STAGES_BY_KIND[self.model.kind]:
            if stage.name not in self.stages:
                continue
            config, trains = self.stages[stage.name], ", ".join(stage.trains)
            for group, rate in config.group_lr.items():
                if rate and group not in stage.trains:
                    raise HiveError(
                        f"stages.{stage.name}.group_lr has {group} = {rate}, but that stage trains {trains} alone"
                    )
            if config.vision_layer_decay != 1 and "vision_encoder" not in stage.trains:
                raise HiveError(
                    f"stages.{stage.name}.vision_layer_decay is {config.vision_layer_decay}, but that stage trains "
                    f"{trains}, not vision_encoder; expected 1"
                )
        judged = [stage.name for stage in VLM_STAGES if stage.name in self.stages]
        if not judged:
            return
        if self.vlm is None:
            raise HiveError(f"vlm is missing, but stages has {', '.join(judged)}; expected a language_model at least")
        if self.vlm.vision_encoder is None and len(judged) == len(self.stages):
            raise HiveError("vlm.vision_encoder is null, but no stage trains an encoder; expected a name or a folder")

    def vlm_model(self, vision_encoder: str) -> ModelConfig:
        """The model of stages 4 and 5 around ``vision_encoder``, in the form of ``model``."""
        assert self.vlm is not None
        return replace(
            self.model,
            kind="cascaded",
            routes=None,
            vision_encoder=vision_encoder,
            language_model=self.vlm.language_model,
            feature_block=self.vlm.feature_block,
        )

    def stage(self, name: str) -> Stage:
        """The stage of that number or name.

        Raises:
            HiveError: there is none, or this recipe does not describe it.
        """
        stage = stage_called(name, self.model.kind)
        if stage.name not in self.stages:
            raise HiveError(f"recipe {self.name} has no stage {stage.name}; it has {', '.join(self.stages)}")
        return stage

    def data_of(self, stage: str) -> DataConfig:
        """The data of a stage."""
        return self.stages[stage].data or self.data
