"""Checks of the ZeRO-3 profiles beside plain ZeRO-3; `test_engine` runs them on 2 ranks, those of nodes on 4."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from checkpoint_checks import identity_of, load, save, writer_of
from engine_checks import trained_losses
from stage_helpers import FEW, config_for, expect_error, make_trainee, moved, run_step, state_of, step_batches

from hive_ds.cost.memory import model_state_bytes, zero_buffer_bytes
from hive_ds.training.checkpoint import newest_checkpoint
from hive_ds.training.ds_config import read_policy

OFFLOADS = ("zero3_offload_optimizer", "zero3_offload_param")


def hpz_policy(ranks: Any, size: int) -> str:
    """Path of zero3_hpz with this partition size: "auto" switches hpZ off on the one node that the tests have."""
    policy = read_policy("zero3_hpz")
    policy["zero_optimization"]["zero_hpz_partition_size"] = size
    path = ranks.folder / f"hpz-{size}.{ranks.world.rank}.json"
    path.write_text(json.dumps(policy))
    return str(path)


def secondary_shares(trainee: Any) -> set[float]:
    """Sizes of the hpZ copies of frozen weights, in parts of the rank's own; empty without hpZ."""
    parameters = [p for p in trainee.engine.model.parameters() if p.ds_secondary_tensor is not None]
    return {parameter.ds_secondary_tensor.numel() / parameter.ds_tensor.numel() for parameter in parameters}


def check_profile_losses(ranks: Any) -> dict[str, list[list[float]]]:
    """Loss and gradient norms by split of the batch and profile; hpZ, which does no arithmetic of its own, is short."""
    return {
        "2x2 zero3_offload_optimizer": trained_losses(ranks, 2, "zero3_offload_optimizer"),
        "2x1 zero3_offload_param": trained_losses(ranks, 1, "zero3_offload_param"),
        "2x1 hpz of 2": trained_losses(ranks, 1, hpz_policy(ranks, 2), steps=5),
        "2x2 zero3_hpz": trained_losses(ranks, 2, "zero3_hpz", steps=2),
    }


def check_profile_bf16(ranks: Any) -> dict[str, list[list[float]]]:
    """The same in bf16."""
    policies = {"zero3_offload_param": "zero3_offload_param", "hpz of 2": hpz_policy(ranks, 2)}
    return {name: trained_losses(ranks, 2, policy, "bf16", steps=3) for name, policy in policies.items()}


def check_reduce_buckets(ranks: Any) -> None:
    """Those that DeepSpeed allocates for a backward pass are those of the memory plan."""
    for name in ("zero1", "zero2"):
        policy = read_policy(name)
        policy["zero_optimization"]["reduce_bucket_size"] = 50_000
        path = ranks.folder / f"{name}-bucket.{ranks.world.rank}.json"
        path.write_text(json.dumps(policy))
        trainee = make_trainee(ranks, stage=3, zero=str(path), config=config_for(2))
        seen = set()

        def look(_: torch.Tensor, optimizer: Any = trainee.engine._optimizer, seen: set[int] = seen) -> None:
            buffers = [buffer for bucket in optimizer.ipg_buckets.values() for buffer in bucket.buffer]
            seen.add(sum(buffer.numel() * buffer.element_size() for buffer in buffers))

        for parameter in trainee.engine.model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(look)
        run_step(ranks, trainee, step_batches(ranks, 0, 2))
        assert max(seen) == zero_buffer_bytes(trainee.plan, policy, precision="fp32"), (name, seen)
        trainee.engine.close()


def check_hpz(ranks: Any) -> None:
    """hpZ keeps its copies of frozen weights, trains on after a skipped step, and leaves nothing to the next engine."""
    trainee = make_trainee(ranks, stage=1, zero=hpz_policy(ranks, 2), config=config_for(2))
    sizes = trainee.engine.partition_sizes()
    run_step(ranks, trainee, step_batches(ranks, 0, 2))
    assert secondary_shares(trainee) == {1.0}
    before = state_of(trainee)
    batches = step_batches(ranks, 1, 2)
    batches[-1].images["pixel_values"][:] = float("nan")
    assert run_step(ranks, trainee, batches)[1].skipped
    assert not moved(before, state_of(trainee))
    assert not run_step(ranks, trainee, step_batches(ranks, 2, 2))[1].skipped
    assert moved(before, state_of(trainee))
    trainee.engine.close()
    plain = make_trainee(ranks, stage=1, config=config_for(2))
    assert plain.engine.partition_sizes() == sizes
    run_step(ranks, plain, step_batches(ranks, 0, 2))
    assert not secondary_shares(plain)
    plain.engine.close()


def check_hpz_that_does_not_divide(ranks: Any) -> None:
    """The ranks are as many as whole groups make."""
    policy = hpz_policy(ranks, 3)
    message = expect_error(lambda: make_trainee(ranks, zero=policy))
    assert message == "zero_hpz_partition_size 3 does not divide 2 ranks; expected the ranks of a node, or 'auto'"


def check_offload(ranks: Any) -> None:
    """Optimizer state lies in CPU memory; each group has its own learning rate; ranks hold half of each weight."""
    for name in OFFLOADS:
        trainee = make_trainee(ranks, zero=name, config=config_for(2, group_lr={"routed_attention": 5e-4}))
        before = state_of(trainee)
        run_step(ranks, trainee, step_batches(ranks, 0, 2), factor=0.5)
        rates = trainee.engine.learning_rates()
        assert {rates["projectors/decay"], rates["routed_attention/decay"]} == {1e-3, 2.5e-4}, rates
        trained = {name for group in trainee.plan.groups for name in group.parameters}
        assert moved(before, state_of(trainee)) == trained
        states = trainee.engine._optimizer.optimizer.state.values()
        assert {value.device for state in states for value in state.values()} == {torch.device("cpu")}
        whole = sum(value.numel() for value in before.values())
        assert sum(trainee.engine.partition_sizes().values()) < 0.7 * whole
        trainee.engine.close()


def check_model_states(ranks: Any) -> None:
    """The closed form of what a rank holds is what DeepSpeed's tensors take."""
    policy = json.loads(json.dumps(read_policy("zero3")))
    limits = {"param_persistence_threshold": 100, "prefetch_bucket_size": FEW, "max_reuse_distance": 0}
    policy["zero_optimization"] |= {f"stage3_{name}": value for name, value in limits.items()}
    path = ranks.folder / f"states.{ranks.world.rank}.json"
    path.write_text(json.dumps(policy))
    for precision in ("bf16", "fp32"):
        trainee = make_trainee(ranks, stage=3, zero=str(path), precision=precision, config=config_for(2))
        engine, zero = trainee.engine, trainee.engine._optimizer
        run_step(ranks, trainee, step_batches(ranks, 0, 2))
        engine.model.eval()
        inputs = step_batches(ranks, 1, 2)[0].model_inputs(ranks.device, engine.dtype)
        engine.forward(**inputs)  # gathers the weights that then stay whole for the step
        parameters = dict(engine.model.named_parameters())
        kept = {name: p.ds_numel * p.element_size() for name, p in parameters.items() if p.ds_persist}
        used = {name: parameters[name].nbytes for name in kept if parameters[name].nbytes}
        assert used.items() <= kept.items()
        assert {name.split(".")[0] for name in kept.keys() - used.keys()} == {"vision_encoder"}  # its tail
        moments = [value for state in zero.optimizer.state.values() for value in state.values() if value.numel() > 1]
        states = model_state_bytes(trainee.plan, policy, ranks=2, precision=precision)
        assert states.parameters == sum(p.ds_tensor.nbytes for p in parameters.values()) + sum(kept.values())
        assert states.gradients == zero.grad_partitions_flat_buffer.nbytes
        assert states.optimizer == sum(value.nbytes for value in [*zero.fp32_partitioned_groups_flat, *moments])
        assert states.host == 0
        engine.close()
        assert torch.nn.functional.linear is torch._C._nn.linear


def hpz_on_nodes(ranks: Any) -> list[list[float]]:
    """Ranks 0, 1 and 2, 3 as two nodes: "auto" makes groups of 2, so a rank's copy is twice its own part."""
    os.environ.update(LOCAL_WORLD_SIZE="2", LOCAL_RANK=str(ranks.world.rank % 2))
    trainee = make_trainee(ranks, stage=1, zero="zero3_hpz", config=config_for(1))
    run_step(ranks, trainee, step_batches(ranks, 0, 1))
    assert secondary_shares(trainee) == {2.0}
    trainee.engine.close()
    return trained_losses(ranks, 1, "zero3_hpz")


def check_restore_amid_training(ranks: Any) -> None:
    """An engine that has trained on goes back to a checkpoint, weights that ZeRO-3 had in place included."""
    config = config_for(2)
    for zero in (3, "zero3"):
        trainee = make_trainee(ranks, stage=3, zero=zero, config=config)
        run_step(ranks, trainee, step_batches(ranks, 0, 2))
        writer = writer_of(ranks, trainee, ranks.folder / f"amid-{zero}", config)
        assert save(writer, 1) is None
        steps = [step_batches(ranks, step, 2) for step in (1, 2)]
        losses = [run_step(ranks, trainee, batches)[0] for batches in steps]
        path = newest_checkpoint(ranks.folder / f"amid-{zero}", ranks.world, print)
        load(ranks, path, trainee, identity_of(trainee, config))
        # No look at the state before: collecting it lets weights go.
        assert [run_step(ranks, trainee, batches)[0] for batches in steps] == losses, zero
        trainee.engine.close()
