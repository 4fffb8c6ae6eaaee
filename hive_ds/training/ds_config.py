"""The DeepSpeed config: ZeRO policy from a JSON file, everything else from the recipe.

A value has one owner. Batch sizes, learning rate, optimizer, clipping and precision are the recipe's; a JSON file that
also sets one is an error, so that no run trains with other numbers than its recipe shows.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from hive_ds.config import StageConfig, TrainingConfig
from hive_ds.errors import HiveError

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


def accumulation_steps(config: StageConfig, num_ranks: int) -> int:
    """Micro-batches of one rank in one optimizer step.

    Raises:
        HiveError: the global batch does not divide; the message says what would.
    """
    total, micro = config.global_batch_size, config.micro_batch_size
    if total % (micro * num_ranks) == 0:
        return total // (micro * num_ranks)
    ranks = ", ".join(str(n) for n in range(1, total // micro + 1) if total % (micro * n) == 0) or "none"
    micros = ", ".join(str(n) for n in range(1, total // num_ranks + 1) if total % (n * num_ranks) == 0) or "none"
    raise HiveError(
        f"global_batch_size {total} is not divisible by {num_ranks} ranks x micro_batch_size {micro}; "
        f"with this micro_batch_size these rank counts divide it: {ranks}; "
        f"with {num_ranks} ranks these micro_batch_sizes do: {micros}"
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
        HiveError: no such file, no JSON object, or a value that the recipe owns.
    """
    path = find_policy(name_or_path)
    try:
        policy = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HiveError(f"ds_config {path}: not readable as JSON ({error})") from error
    if not isinstance(policy, dict):
        raise HiveError(f"ds_config {path}: expected a JSON object, found {type(policy).__name__}")
    for key, owner in _OWNERS.items():
        if key in policy:
            raise HiveError(f"ds_config {path} sets {key}, which belongs to {owner}; remove it from the file")
    _check_zero(path, policy.get("zero_optimization", {}), policy.get("data_types", {}))
    return policy


def _check_zero(path: Path, zero: dict[str, Any], data_types: dict[str, Any]) -> None:
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise HiveError(f"ds_config {path}: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3")
    if stage < 2 and data_types.get("grad_accum_dtype"):
        raise HiveError(f"ds_config {path}: data_types.grad_accum_dtype needs ZeRO 2 or 3, but the stage is {stage}")
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") != "none":
            raise HiveError(f"ds_config {path}: zero_optimization.{key} is not supported by this version; remove it")


def build_ds_config(
    policy: dict[str, Any], stage: StageConfig, training: TrainingConfig, *, num_ranks: int, log_folder: Path, job: str
) -> dict[str, Any]:
    """Return ``policy`` with the recipe's values filled in; HiveError where wandb is asked for and not installed.

    Args:
        policy: of `read_policy`.
        stage: numbers of the stage.
        training: precision and monitors.
        num_ranks: ranks of the run.
        log_folder: folder for TensorBoard files.
        job: name of the run in TensorBoard and wandb.
    """
    if training.wandb and importlib.util.find_spec("wandb") is None:
        raise HiveError("training.wandb is true, but wandb is not installed: pip install 'hive-ds[wandb]'")
    return {
        **policy,
        "train_batch_size": stage.global_batch_size,
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(stage, num_ranks),
        "gradient_clipping": stage.clip,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "tensorboard": {"enabled": training.tensorboard, "output_path": str(log_folder), "job_name": job},
        "wandb": {"enabled": training.wandb, "project": "hive-ds", "group": job},
    }
