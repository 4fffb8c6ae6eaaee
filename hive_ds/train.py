"""Train one stage: ``deepspeed --module hive_ds.train --recipe R --stage N --run RUN`` (also torchrun, srun, mpirun).

Recipe, ranks, model, stage, data, engine, resume, loop, hand-over: `train` is the table of contents.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hive_ds.config import Recipe, StageConfig
from hive_ds.constants import EXIT_STOPPED
from hive_ds.data.loader import build_loader, check_folders
from hive_ds.errors import HiveError
from hive_ds.files import flush, must_write, write_whole
from hive_ds.model.attention_backends import TrainedModel, describe_attention, warm_up_attention
from hive_ds.model.compiling import compile_blocks
from hive_ds.model.language_loss import describe_loss
from hive_ds.processing import HiveProcessor
from hive_ds.recipe import dump_recipe, load_recipe
from hive_ds.stages import VLM_STAGES, Stage
from hive_ds.train_options import build_parser, how_to_go_on, next_commands
from hive_ds.training.attempt import Attempt
from hive_ds.training.checkpoint import RunIdentity, load_checkpoint, newest_checkpoint, read_state, save_model
from hive_ds.training.checkpoint_writer import CheckpointWriter
from hive_ds.training.distributed import World, all_values, device_name, from_main, read_world, start, stop
from hive_ds.training.ds_config import build_ds_config, read_policy, refusals_named, start_wandb, warn_of_rounding
from hive_ds.training.engine import Engine
from hive_ds.training.faults import leave, report_crash, report_error, report_interrupt
from hive_ds.training.flops import FlopCounter, matmul_rate, warn_of_slow_bf16
from hive_ds.training.gather_units import gathers_by_layer
from hive_ds.training.global_batch import describe_batch, fit_micro_batch
from hive_ds.training.groups import StagePlan, groups_of, plan_stage
from hive_ds.training.loop import Job
from hive_ds.training.loop import train as run_loop
from hive_ds.training.maps import SampleMaps
from hive_ds.training.metrics import Meter, MetricsLog
from hive_ds.training.micro_batch import auto_micro_batch
from hive_ds.training.origin import changed_values, describe_origin
from hive_ds.training.pace import Pace
from hive_ds.training.place import here, one_line
from hive_ds.training.profile import StepProfile
from hive_ds.training.questions import Questions
from hive_ds.training.run_folder import StageFolder
from hive_ds.training.schedule import Schedule
from hive_ds.training.start_model import start_model
from hive_ds.training.table import print_plan
from hive_ds.training.watchdog import longest_wait, stop_watching, watch
from hive_ds.versions import installed_versions

if TYPE_CHECKING:
    from hive_ds.data.mds import SampleLoader


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit code: a `HiveError`'s own, said in one line, or 1."""
    options = build_parser().parse_args(arguments)
    world = World()
    try:
        world = read_world(os.environ)
        finished = train(options, world)
    except HiveError as error:
        report_error(error, world, debug=options.debug)
        return error.exit_code
    except Exception as error:
        report_crash(error, world, one_line(here.describe(error)))
        return 1
    except KeyboardInterrupt:
        return report_interrupt(world)
    finally:
        stop_watching()
    stop()
    return 0 if finished else EXIT_STOPPED


@dataclass(frozen=True)
class Run:
    """What every step of `train` needs to know."""

    recipe: Recipe
    stage: Stage
    config: StageConfig
    folder: StageFolder
    world: World
    device: torch.device
    attempt: Attempt

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.world.is_main:
            print(text, flush=True)


def train(options: argparse.Namespace, world: World) -> bool:
    """Train one stage from its start, or from its newest checkpoint, to its end; False if it was stopped before."""
    recipe = load_recipe(options.recipe, options.set)
    stage = recipe.stage(options.stage)
    asked = recipe.stages[stage.name]
    config = fit_micro_batch(asked, world.size)
    policy = read_policy(recipe.training.ds_config)
    folder = StageFolder(Path(options.run), stage)
    hang_timeout = recipe.training.hang_timeout
    device = start(world, longest_wait(hang_timeout))
    run = Run(recipe, stage, config, folder, world, device, Attempt(folder.path, world))
    watch(folder.path / "hang", world, hang_timeout)
    if from_main(run.folder.done.is_file()):
        run.say("; ".join([f"stage {stage.number} of {options.run} is done already", *next_commands(options, run)]))
        for line in changed_values(folder.path / "recipe.yaml", recipe, stage):
            run.say(f"warning: it was trained with {line}; a new run folder trains it anew")
        return True
    check_folders(recipe.data_of(stage.name))
    start_wandb(recipe.training, recipe.name, world)
    run.attempt.make_folder()
    if isinstance(asked.micro_batch_size, int):
        run.say(describe_batch(config, world.size, asked.micro_batch_size))
    model, processor = start_model(recipe, folder, world, run.say)
    here.follow(model)
    plan = plan_stage(model, stage, groups_of(model), config)
    model.train()  # once more: what is frozen is known now
    _warn_untrained_blocks(run, model)
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    _prepare_attention(run, model, dtype)
    if recipe.training.compile:
        compile_blocks(model, device, dtype, apart=gathers_by_layer(model, policy))
    auto = asked.micro_batch_size == "auto"
    data = None if auto else _load_data(run, processor)  # the search reads first: a cache takes one loader at a time
    with refusals_named(recipe.training.ds_config):
        engine = Engine(model, plan.groups, _ds_config(run, policy), config, world=world, device=device)
    if auto:
        run = replace(run, config=_find_micro_batch(run, engine, processor))
    loader, validation = data or _load_data(run, processor)
    if warning := warn_of_rounding(policy, recipe.training.precision, run.config, world.size):
        run.say(warning)
    if world.is_main:
        print_plan(plan, engine)
    questions = Questions.load(recipe.data_of(stage.name), processor, run.config.micro_batch, world)
    maps = SampleMaps.load(folder.maps, recipe.data_of(stage.name), processor, recipe.training.maps_interval)
    job, first_step = _start_job(run, engine, plan, loader, validation, questions, maps)
    _write_inputs(run, _ds_config(run, policy))  # a refused resume leaves those of the run that it was refused
    done = run_loop(job, first_step)
    if done < job.schedule.steps:
        job.metrics.write("stop", done)
        run.say(f"stopped after step {done} of {job.schedule.steps}; {how_to_go_on(folder.path)}")
        job.engine.close()
        return False
    here.enter("hand-over", ())
    save_model(run.folder.model, job.engine, processor, world, run.attempt)
    _finish(run, job)
    run.say("\n".join([f"stage {stage.number} is done: {run.folder.model}", *next_commands(options, run)]))
    return True


def _find_micro_batch(run: Run, engine: Engine, processor: HiveProcessor) -> StageConfig:
    """The stage's numbers with the largest micro-batch that fits; ``engine`` takes it from now on."""
    size = auto_micro_batch(engine, run.recipe, run.folder, processor, run.say)
    engine.use_micro_batch(size)
    run.say(describe_batch(replace(run.config, micro_batch_size=size), run.world.size, size))
    return replace(run.config, micro_batch_size=size)


def _load_data(run: Run, processor: HiveProcessor) -> tuple[SampleLoader, dict[str, SampleLoader]]:
    """The training loader, and those of the validation losses by name."""
    data, config = run.recipe.data_of(run.stage.name), run.config

    def build(folder: str | Mapping[str, float], global_batch_size: int, *, train: bool) -> SampleLoader:
        return build_loader(
            data,
            processor.tokenizer,
            processor.image_processor,
            micro_batch_size=config.micro_batch,
            global_batch_size=global_batch_size,
            seed=run.recipe.training.seed,
            train=train,
            folder=folder,
        )

    folders = {"loss": data.validation, "text_loss": data.text_validation}
    one_batch_each = config.micro_batch * run.world.size
    validation = {name: build(path, one_batch_each, train=False) for name, path in folders.items() if path}
    return build(data.train, config.global_batch_size, train=True), validation


def _ds_config(run: Run, policy: dict[str, Any]) -> dict[str, Any]:
    return build_ds_config(
        policy,
        run.config,
        run.recipe.training,
        num_ranks=run.world.size,
        log_folder=run.folder.path / "tensorboard",
        job=run.recipe.name,
    )


def _write_inputs(run: Run, ds_config: dict[str, Any]) -> None:
    """Write the resolved recipe and the DeepSpeed config to the run folder."""
    if run.world.is_main:
        with must_write(run.folder.path, "make room there, or name another folder"):
            write_whole(run.folder.path / "recipe.yaml", dump_recipe(run.recipe))
            write_whole(run.folder.path / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")


def _start_job(
    run: Run,
    engine: Engine,
    plan: StagePlan,
    loader: SampleLoader,
    validation: dict[str, SampleLoader],
    questions: Questions | None,
    maps: SampleMaps | None,
) -> tuple[Job, int]:
    """Resume from the newest checkpoint if there is one, and return the job and its first step."""
    world, device, training, config = run.world, run.device, run.recipe.training, run.config
    model = engine.model
    torch.manual_seed(training.seed + world.rank)
    identity, origin = RunIdentity.of(plan, training, config, model), describe_origin(run.recipe)
    writer = CheckpointWriter(run.folder.path, engine, identity, origin, world, run.attempt, training)
    steps = _num_steps(config, loader, engine)
    first_step, counts = _resume(run, writer, loader, steps)
    rate = matmul_rate(device, engine.dtype)
    if warning := warn_of_slow_bf16(device, engine.dtype, rate):
        run.say(warning)
    metrics = MetricsLog(run.folder.metrics, world, first_step)
    metrics.write(
        "start",
        first_step,
        ranks=world.size,
        device=device_name(device),
        matmul_flops_per_second=rate,
        hosts=list(dict.fromkeys(all_values(socket.gethostname()))),
        versions=installed_versions(),
        micro_batch_size=config.micro_batch,
        vision_sha256=getattr(model.config, "vision_sha256", None),
    )
    job = Job(
        engine=engine,
        loader=loader,
        validation=validation,
        schedule=Schedule(steps, config.warmup_ratio, config.min_lr_ratio),
        training=training,
        metrics=metrics,
        meter=Meter(world.size, rate, device, first_step * config.global_batch_size, **counts),
        pace=Pace(world, device, engine.dtype),
        flops=FlopCounter(model, plan),
        patch_size=model.config.vision_config.patch_size,
        world=world,
        device=device,
        checkpoints=writer,
        attempt=run.attempt,
        questions=questions,
        maps=maps,
        profile=StepProfile.of(training.profile, run.folder.profile, device) if world.is_main else None,
    )
    return job, first_step


def _resume(run: Run, writer: CheckpointWriter, loader: SampleLoader, steps: int) -> tuple[int, dict[str, Any]]:
    """Take the folder over and load its newest complete checkpoint, if there is one: steps done, and counts till then.

    What is refused is refused before: an attempt that trains there, as it should, would end by the signature.
    """
    checkpoint = newest_checkpoint(run.folder.path, run.world, run.say)
    if checkpoint is None:
        run.attempt.sign()
        return 0, {}
    state = read_state(checkpoint, writer.engine, writer.identity, origin=writer.origin, warn=run.say)
    if state["step"] > steps:
        raise HiveError(f"{run.folder.path}: its checkpoint has {state['step']} steps, more than the stage's {steps}")
    loader.load_state_dict(state["loader"])
    run.attempt.sign()
    load_checkpoint(checkpoint, state, writer.engine, run.world)
    run.say(f"resumed from {checkpoint}")
    return state["step"], state["loader"]["counts"]


def _finish(run: Run, job: Job) -> None:
    job.metrics.write("end", job.schedule.steps, skipped_steps=job.engine.skipped_steps)
    if run.world.is_main:
        run.attempt.check()
        run.folder.done.touch()
        flush(run.folder.done.parent)
    job.engine.close()


def _num_steps(config: StageConfig, loader: SampleLoader, engine: Engine) -> int:
    """Optimizer steps of the stage: as the recipe says, or its epochs over the data."""
    return config.steps or max(1, round(config.epochs * len(loader) / engine.accumulation))


def _warn_untrained_blocks(run: Run, model: TrainedModel) -> None:
    if run.stage in VLM_STAGES:  # they train none of it
        return
    blocks = range(model.last_vision_block + 1, model.config.vision_config.num_hidden_layers + 1)
    names = ", ".join(
        [*(f"block {block}" for block in blocks), "the final norm and the pooling head, where there is one"]
    )
    run.say(f"warning: no gradient reaches these parts of the vision encoder: {names}")


def _prepare_attention(run: Run, model: TrainedModel, dtype: torch.dtype) -> None:
    """Say which attention runs where, and compile its kernels before a step waits for them."""
    for line in describe_attention(model, run.device, dtype):
        run.say(line)
    run.say(describe_loss(model.language_loss, run.device))
    answers = run.recipe.data_of(run.stage.name).questions is not None
    seconds = warm_up_attention(model, run.device, dtype, answers=answers)
    if seconds:
        run.say(f"attention kernels are compiled ({seconds:.0f} s)")


if __name__ == "__main__":
    leave(main())
