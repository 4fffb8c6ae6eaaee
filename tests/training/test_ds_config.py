"""The DeepSpeed config: one owner a value; and who this process is, under any launcher."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from tiny_run import TinyRun

from hive_ds.config import StageConfig, TrainingConfig
from hive_ds.errors import HiveError
from hive_ds.launch.meeting import meeting_port, set_meeting_point
from hive_ds.training.distributed import World, read_world, start
from hive_ds.training.ds_config import ZERO_DEFAULTS, build_ds_config, read_policy, warn_of_rounding
from hive_ds.training.global_batch import describe_batch, fit_micro_batch, micro_batches

STAGE = StageConfig(lr=1e-3, global_batch_size=24, micro_batch_size=2, clip=0.6)


def test_unset_values_are_deepspeeds() -> None:
    from hive_ds.training.engine import deepspeed

    fields = deepspeed.runtime.zero.config.DeepSpeedZeroConfig.model_fields
    own = {spec.alias or name: spec.default for name, spec in fields.items()}
    assert {name: int(own[name]) for name in ZERO_DEFAULTS} == ZERO_DEFAULTS


@pytest.mark.parametrize(
    ("policy", "zero"),
    [("zero0", 0), ("zero1", 1), ("zero2", 2)]
    + [(name, 3) for name in ("zero3", "zero3_offload_optimizer", "zero3_offload_param")],
)
def test_recipe_values_are_filled_in(policy: str, zero: int) -> None:
    config = build_ds_config(
        read_policy(policy), STAGE, TrainingConfig(), num_ranks=3, log_folder=Path("logs"), job="run"
    )
    assert config["zero_optimization"]["stage"] == zero
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.6
    assert config["bf16"] == {"enabled": True}
    assert "optimizer" not in config
    assert "scheduler" not in config


def test_deepspeeds_timer_is_off() -> None:
    """It would wait for the GPU before every forward pass, however many micro-batches a step has."""
    from hive_ds.training.engine import deepspeed

    config = build_ds_config(
        read_policy("zero1"), STAGE, TrainingConfig(), num_ranks=3, log_folder=Path("logs"), job="run"
    )
    assert deepspeed.utils.config.get_timers_config({}).enabled
    assert not deepspeed.utils.config.get_timers_config(config).enabled


@pytest.mark.parametrize(
    ("key", "value", "owner"),
    [
        ("train_batch_size", "auto", "stages.*.global_batch_size"),
        ("optimizer", {"type": "AdamW"}, "stages.*.lr"),
        ("scheduler", {"type": "WarmupLR"}, "stages.*.lr"),
        ("gradient_clipping", 1.0, "stages.*.clip"),
        ("bf16", {"enabled": True}, "training.precision"),
        ("fp16", {"enabled": True}, "training.precision"),
        ("steps_per_print", 1, "training.log_interval"),
        ("wandb", {"enabled": True}, "training.wandb"),
    ],
)
def test_value_that_the_recipe_owns_is_named(tmp_path: Path, key: str, value: object, owner: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: value}))
    with pytest.raises(HiveError) as error:
        read_policy(str(path))
    assert f"mine.json sets {key}, which belongs to {owner}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "has no zero_optimization; expected it with a stage"),
        ('{"zero_optimisation": {"stage": 3}}', r"unknown key zero_optimisation; did you mean zero_optimization\?"),
        ('{"zero_optimization": {"stage": 2}, "data_type": {}}', r"unknown key data_type; did you mean data_types\?"),
        ('{"zero_optimization": {"stage": 4}}', "is 4;"),
        ('{"zero_optimization": {"stage": true}}', "stage is True; expected 0, 1, 2 or 3"),
        ('{"zero_optimization": true}', "zero_optimization is True; expected a JSON object"),
        ('{"data_types": "fp32"}', "data_types is 'fp32'; expected a JSON object"),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}',
            "offload_optimizer needs ZeRO 3",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            "offload_param.device is 'nvme'; e",
        ),
        ('{"zero_optimization": {"stage": 3, "offload_param": true}}', "offload_param is True; expected a JSON object"),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}',
            "optimizer.ratio is not supported",
        ),
        (
            '{"zero_optimization": {"stage": 3, "cpu_offload": true}}',
            "cpu_offload is not supported; expected offload_op",
        ),
        (
            '{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "node"}}',
            "is 'node'; expected 'auto' or a num",
        ),
        ('{"zero_optimization": {"stage": 2, "zero_hpz_partition_size": "auto"}}', "hpz_partition_size needs ZeRO 3"),
        ('{"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}', "needs ZeRO 2 or 3"),
    ],
)
def test_wrong_policy_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(HiveError, match=message):
        read_policy(str(path))


@pytest.mark.parametrize(
    ("local_sizes", "size"),
    [([2, 2, 2, 2], 2), ([1, 1], 1), ([4, 4, 4, 4], 1), ([2, 2, 4, 4, 4, 4], "nodes have 2 or 4")],
    ids=["two of two", "two of one", "one node", "uneven"],
)
def test_hpz_size_is_the_ranks_of_a_node(
    monkeypatch: pytest.MonkeyPatch, local_sizes: list[int], size: int | str
) -> None:
    monkeypatch.setattr("hive_ds.training.ds_config.all_values", lambda value: local_sizes)

    def built() -> Any:
        config = build_ds_config(
            read_policy("zero3_hpz"),
            STAGE,
            TrainingConfig(),
            num_ranks=len(local_sizes),
            log_folder=Path("logs"),
            job="run",
        )
        return config["zero_optimization"]["zero_hpz_partition_size"]

    if isinstance(size, int):
        assert built() == size
    else:
        with pytest.raises(HiveError, match=size):
            built()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stage3_max_live_params", 5, "stage3_max_live_params = 5: Extra inputs are not permitted"),
        ("reduce_bucket_size", "big", "reduce_bucket_size = 'big': Input should be a valid "),
    ],
)
def test_what_deepspeed_refuses_is_named(tiny: TinyRun, tmp_path: Path, key: str, value: object, message: str) -> None:
    policy = tmp_path / "own.json"
    policy.write_text(json.dumps({"zero_optimization": {"stage": 3, key: value}}))
    arguments = tiny.arguments(1, "refused", "--set", f"training.ds_config={policy}")
    ended = run_forked("hive_ds.train:main", arguments, tiny.environment(), 1, timeout=240)
    assert ended.returncode == 2, ended.stderr
    assert f"error: ds_config {policy}: DeepSpeed refuses {message}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_missing_policy_names_those_there_are() -> None:
    with pytest.raises(HiveError, match=r"ds_config 'zero9': no such file; expected a path or one of zero0, zero1"):
        read_policy("zero9")


@pytest.mark.parametrize(
    ("most", "ranks", "line"),
    [
        (2, 3, "24 samples a step over 3 ranks, each 4 x micro-batch 2"),
        (2, 24, "24 samples a step over 24 ranks, each 1 x micro-batch 1, for 2 does not divide 1"),
        (5, 2, "24 samples a step over 2 ranks, each 3 x micro-batch 4, for 5 does not divide 12"),
        (99, 1, "24 samples a step over 1 ranks, each 1 x micro-batch 24, for 99 does not divide 24"),
    ],
)
def test_micro_batch_follows_the_ranks(most: int, ranks: int, line: str) -> None:
    fitted = fit_micro_batch(replace(STAGE, micro_batch_size=most), ranks)
    assert describe_batch(fitted, ranks, most) == f"batch: {line}"
    config = build_ds_config(
        read_policy("zero2"), fitted, TrainingConfig(), num_ranks=ranks, log_folder=Path("logs"), job="run"
    )
    parts = (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"], ranks)
    assert math.prod(parts) == config["train_batch_size"] == 24


@pytest.mark.parametrize(
    ("policy", "precision", "ranks", "warns"),
    [
        ("zero0", "bf16", 1, True),
        ("zero1", "bf16", 1, True),
        ("zero1", "bf16", 2, False),
        ("zero1", "fp32", 1, False),
        ("zero2", "bf16", 1, False),
        ("zero3", "bf16", 1, False),
    ],
)
def test_many_micro_batches_summed_in_bf16_are_warned_of(policy: str, precision: str, ranks: int, warns: bool) -> None:
    config = StageConfig(lr=1e-3, global_batch_size=16, micro_batch_size=1)
    found = warn_of_rounding(read_policy(policy), precision, config, ranks)
    assert (found is not None) == warns
    if found:
        assert "the gradients of 16 micro-batches in bf16" in found


def test_auto_may_be_a_whole_share() -> None:
    auto = replace(STAGE, micro_batch_size="auto")
    assert micro_batches(auto, 2) == [1, 2, 3, 4, 6, 12]
    assert micro_batches(replace(STAGE, micro_batch_size=5), 2) == [1, 2, 3, 4]
    assert fit_micro_batch(auto, 3).micro_batch == 8
    with pytest.raises(HiveError, match="24 is not divisible by 5 ranks"):
        micro_batches(auto, 5)


def test_ranks_that_do_not_divide_the_batch_hear_which_would() -> None:
    with pytest.raises(HiveError) as error:
        fit_micro_batch(STAGE, 5)
    assert str(error.value) == (
        "global_batch_size 24 is not divisible by 5 ranks; these rank counts divide it: 1, 2, 3, 4, 6, 8, 12, 24"
    )


STEP = {
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_NODEID": "3",
}


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World(0, 0, 1, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, World(3, 1, 4, 2)),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, World(1, 1, 2, 2)),
        (STEP, World(6, 0, 7, 1)),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, World(0, 0, 1, 1)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, World(0, 0, 1, 1)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            World(2, 0, 4, 2),
        ),
    ],
)
def test_every_launcher_is_understood(env: dict[str, str], world: World) -> None:
    assert read_world(env) == world


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, "contradict one another: RANK=2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "4"}, "contradict .* ranks on this host 4"),
        ({"RANK": "3", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, "contradict .* LOCAL_RANK=2"),
        ({**STEP, "SLURM_NODEID": "4"}, r"SLURM_NODEID is 4, but .*'2\(x3\),1' lists 4 nodes"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2x3"}, r"is '2x3'; expected counts like 2\(x3\),1"),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "none of LOCAL_WORLD_SIZE, LOCAL_SIZE says"),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is 'one'; expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK is ''"),
    ],
)
def test_contradictions_are_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(HiveError, match=message):
        read_world(env)


@pytest.mark.parametrize("port", ["", "abc", "0", "65536"])
def test_a_port_that_is_none_is_named(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 0, 2, 2)
    for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # `start` sets them
        monkeypatch.setenv(name, "")
    with pytest.raises(HiveError, match=rf"MASTER_PORT is '{port}'; expected "):
        start(world)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-2]", "node1"),
        ("gpu-[007-012,3],login", "gpu-007"),
        ("a,b[1-2]", "a"),
        ("r[02,04]n[1-3],x9", "r02n1"),
    ],
)
def test_ranks_of_a_slurm_step_know_where_to_meet(nodes: str, first: str) -> None:
    env = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_RESTART_COUNT": "1"}
    set_meeting_point(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == (first, str(12000 + 7 * 131 + 13 + 2))
    ports = [meeting_port({"SLURM_JOB_ID": str(job)}) for job in (12345678, 87654321, *range(9000, 9200))]
    assert all(12000 <= port < 32000 for port in ports), "a port from 32768 on may be in use for a connection"
    given = {**env, "MASTER_ADDR": "mine", "MASTER_PORT": "1"}
    set_meeting_point(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("mine", "1")
    alone: dict[str, str] = {"SLURM_JOB_ID": "7"}  # the shell of an interactive job
    set_meeting_point(alone)
    assert alone == {"SLURM_JOB_ID": "7"}
