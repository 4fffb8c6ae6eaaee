"""The DeepSpeed config: ZeRO policy from a JSON file, everything else from the recipe.

A value has one owner. Batch sizes, learning rate, optimizer, clipping and precision are the recipe's; a JSON file that
also sets one is an error, so that no run trains with other numbers than its recipe shows.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hive_ds.config import StageConfig, TrainingConfig
from hive_ds.errors import HiveError, OutsideError
from hive_ds.recipe_values import nearest
from hive_ds.training.distributed import World, all_values, read_world

_OWNERS = {
    "train_batch_size": "stages.*.global_batch_size",
    "train_micro_batch_size_per_gpu": "stages.*.micro_batch_size",
    "gradient_accumulation_steps": "stages.*.global_batch_size",
    "managed_gradient_accumulation": "the training loop",
    "optimizer": "stages.*.lr, betas, eps, weight_decay",
    "scheduler": "stages.*.lr, warmup_ratio, min_lr_ratio",
    "gradient_clipping": "stages.*.clip",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "fp16": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "steps_per_print": "training.log_interval",
    "tensorboard": "training.tensorboard",
    "wandb": "training.wandb",
    "zero_allow_untested_optimizer": "the training engine",
    "zero_force_ds_cpu_optimizer": "the training engine",
}
"""DeepSpeed's key -> who sets it instead."""

_PROJECT = "hive-ds"
"""In wandb."""
BF16_SUMS = 8
"""Micro-batches a step that ZeRO 0 and 1 may add up in bf16 without a word."""
ZERO_DEFAULTS = {
    "stage": 0,
    "reduce_bucket_size": 500_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
}
"""DeepSpeed's values (0.19.8) of the keys that are read here, where a policy does not set them."""
_SECTIONS = ("zero_optimization", "data_types")
"""What a policy has, as a rule; DeepSpeed passes over keys that it does not know."""
_TIMERS = {"throughput": {"enabled": False}}
"""DeepSpeed's own timer waits for the GPU before every forward pass and behind every step; nobody reads it."""
_HPZ = "zero_hpz_partition_size"
_OFFLOAD = ("offload_optimizer", "offload_param")
_UNSUPPORTED = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "zenflow": "offload_optimizer",
}
"""Key of zero_optimization that the engine cannot train with -> what to write instead."""


def zero_section(policy: Mapping[str, Any]) -> dict[str, Any]:
    """``zero_optimization`` of a policy or of a whole DeepSpeed config, under it `ZERO_DEFAULTS`."""
    return {**ZERO_DEFAULTS, **policy.get("zero_optimization", {})}


def warn_of_rounding(policy: dict[str, Any], precision: str, config: StageConfig, num_ranks: int) -> str | None:
    """A warning where ZeRO 0 or 1 adds up many micro-batches in bf16; 2 and 3 do so in fp32."""
    accumulation = config.global_batch_size // num_ranks // config.micro_batch
    stage = zero_section(policy)["stage"]
    if stage > 1 or precision != "bf16" or accumulation <= BF16_SUMS:
        return None
    return (
        f"warning: ZeRO {stage} adds up the gradients of {accumulation} micro-batches in bf16, and rounds each time; "
        "take zero2 or zero3, or a larger micro_batch_size"
    )


def find_policy(name_or_path: str) -> Path:
    """The JSON file of a ZeRO policy: a name from ``ds_configs/`` or a path.

    Raises:
        HiveError: there is no such file.
    """
    package = Path(__file__).resolve().parents[1]
    folders = [folder for folder in (package / "ds_configs", package.parent / "ds_configs") if folder.is_dir()]
    candidates = [Path(name_or_path), *(folder / f"{name_or_path}.json" for folder in folders)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for folder in folders for path in folder.glob("*.json"))
    raise HiveError(f"ds_config {name_or_path!r}: no such file; expected a path or one of {', '.join(known)}")


def read_policy(name_or_path: str) -> dict[str, Any]:
    """Read a ZeRO policy.

    Raises:
        HiveError: no such file, no JSON object, a value that the recipe owns, or no ZeRO policy in it.
    """
    path = find_policy(name_or_path)
    try:
        policy = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HiveError(f"ds_config {path}: not readable as JSON ({error})") from error
    if not isinstance(policy, dict):
        raise HiveError(f"ds_config {path}: expected a JSON object, found {type(policy).__name__}")
    for key in _SECTIONS:
        if not isinstance(policy.get(key, {}), dict):
            raise HiveError(f"ds_config {path}: {key} is {policy[key]!r}; expected a JSON object")
    for key, owner in _OWNERS.items():
        if key in policy:
            raise HiveError(f"ds_config {path} sets {key}, which belongs to {owner}; remove it from the file")
    for key in policy:
        if key not in _SECTIONS and (hint := nearest(key, [*_SECTIONS], cutoff=0.8)):
            raise HiveError(f"ds_config {path}: unknown key {key}{hint}")
    if "zero_optimization" not in policy:
        raise HiveError(f"ds_config {path} has no zero_optimization; expected it with a stage, as in zero0.json")
    _check_zero(path, policy["zero_optimization"], policy.get("data_types", {}))
    return policy


@contextmanager
def refusals_named(name_or_path: str) -> Iterator[None]:
    """A `HiveError` with file, key and value where DeepSpeed, asked inside, refuses what a policy says."""
    from pydantic import ValidationError  # comes with DeepSpeed, without which policies can be read

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))  # of whichever section it was
        raise HiveError(
            f"ds_config {find_policy(name_or_path)}: DeepSpeed refuses {key} = {first['input']!r}: {first['msg']}"
        ) from error


def _check_zero(path: Path, zero: dict[str, Any], data_types: dict[str, Any]) -> None:
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise HiveError(f"ds_config {path}: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3")
    if stage < 2 and data_types.get("grad_accum_dtype"):
        raise HiveError(f"ds_config {path}: data_types.grad_accum_dtype needs ZeRO 2 or 3, but the stage is {stage}")
    for key, instead in _UNSUPPORTED.items():
        if key in zero:
            raise HiveError(f"ds_config {path}: zero_optimization.{key} is not supported; expected {instead}")
    for key in _OFFLOAD:
        _check_offload(path, key, zero.get(key, {}), stage)
    size = zero.get(_HPZ, 1)
    if size != "auto" and (type(size) is not int or size < 1):
        raise HiveError(f"ds_config {path}: zero_optimization.{_HPZ} is {size!r}; expected 'auto' or a number of ranks")
    if size != 1 and stage != 3:
        raise HiveError(f"ds_config {path}: zero_optimization.{_HPZ} needs ZeRO 3, but the stage is {stage}")


def _check_offload(path: Path, key: str, offload: Any, stage: int) -> None:
    if not isinstance(offload, dict):
        raise HiveError(f"ds_config {path}: zero_optimization.{key} is {offload!r}; expected a JSON object")
    device = offload.get("device", "none")
    if device not in ("none", "cpu"):
        raise HiveError(f"ds_config {path}: zero_optimization.{key}.device is {device!r}; expected 'cpu' or 'none'")
    unknown = sorted(offload.keys() - {"device", "pin_memory"})
    if unknown:
        raise HiveError(
            f"ds_config {path}: zero_optimization.{key}.{unknown[0]} is not supported; expected device and pin_memory"
        )
    if device != "none" and stage != 3:
        raise HiveError(f"ds_config {path}: zero_optimization.{key} needs ZeRO 3, but the stage is {stage}")


def build_ds_config(
    policy: dict[str, Any], stage: StageConfig, training: TrainingConfig, *, num_ranks: int, log_folder: Path, job: str
) -> dict[str, Any]:
    """Return ``policy`` with the recipe's values filled in; every rank calls it.

    Args:
        policy: of `read_policy`.
        stage: numbers of the stage, of `hive_ds.training.global_batch.fit_micro_batch`.
        training: precision and monitors.
        num_ranks: ranks of the run.
        log_folder: folder for TensorBoard files.
        job: name of the run in TensorBoard and wandb.

    Raises:
        HiveError: the ranks cannot be divided as ``zero_hpz_partition_size`` says.
    """
    zero = policy.get("zero_optimization", {})
    if _HPZ in zero:
        zero = {**zero, _HPZ: _hpz_size(zero[_HPZ], num_ranks)}
    return {
        "timers": _TIMERS,
        **policy,
        "zero_optimization": zero,
        "train_batch_size": stage.global_batch_size,
        "train_micro_batch_size_per_gpu": stage.micro_batch,
        "gradient_accumulation_steps": stage.global_batch_size // (stage.micro_batch * num_ranks),
        "gradient_clipping": stage.clip,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "tensorboard": {"enabled": training.tensorboard, "output_path": str(log_folder), "job_name": job},
        "wandb": {"enabled": training.wandb, "project": _PROJECT, "group": job},
    }


def start_wandb(training: TrainingConfig, job: str, world: World) -> None:
    """Where the recipe asks for wandb, begin its run before models are loaded; DeepSpeed goes on with it.

    Args:
        training: says whether.
        job: name of the run, as in `build_ds_config`.
        world: this process among all; rank 0 logs.

    Raises:
        HiveError: wandb is not installed, or has no key.
        OutsideError: its server does not answer.
    """
    if not training.wandb:
        return
    if importlib.util.find_spec("wandb") is None:
        raise HiveError("training.wandb is true, but wandb is not installed: pip install 'hive-ds[wandb]'")
    if not world.is_main:
        return
    import wandb

    try:
        wandb.init(project=_PROJECT, group=job)
    except wandb.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        kind = OutsideError if type(error) is wandb.errors.CommError else HiveError  # what is below it is a wrong key
        raise kind(
            f"training.wandb is true, but wandb does not start: {reason}; without a key or a network, set "
            "WANDB_MODE=offline, or training.wandb: false"
        ) from error


def _hpz_size(size: int | str, num_ranks: int) -> int:
    """Ranks that hold one copy of the weights between them; "auto" means those of a node, 1 none on a single node."""
    if size == "auto":
        per_node = sorted(set(all_values(read_world(os.environ).local_size)))
        if len(per_node) > 1:
            raise HiveError(
                f"{_HPZ} 'auto' needs as many ranks on every node, but nodes have {' or '.join(map(str, per_node))}"
            )
        return per_node[0] if per_node[0] < num_ranks else 1
    if num_ranks % int(size):
        raise HiveError(f"{_HPZ} {size} does not divide {num_ranks} ranks; expected the ranks of a node, or 'auto'")
    return int(size)
