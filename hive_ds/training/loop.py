"""The training loop: one for every stage and baseline."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

from hive_ds.analysis.block_gradients import watched_gradients
from hive_ds.config import TrainingConfig
from hive_ds.data.batch import BadSample
from hive_ds.errors import HiveError, OutsideError
from hive_ds.training.attempt import Attempt
from hive_ds.training.bad_samples import check_bad_share
from hive_ds.training.checkpoint_writer import CheckpointWriter, SaveReport
from hive_ds.training.distributed import World, all_values, sum_over_ranks
from hive_ds.training.engine import Engine, StepReport
from hive_ds.training.flops import FlopCounter
from hive_ds.training.maps import SampleMaps, norms_over_ranks
from hive_ds.training.metrics import LISTED_IN_MONITOR, Meter, MetricsLog, Totals
from hive_ds.training.pace import Pace
from hive_ds.training.place import here
from hive_ds.training.profile import StepProfile
from hive_ds.training.questions import Questions
from hive_ds.training.schedule import Schedule
from hive_ds.training.step_sums import Fetched, add_up, fetch


@dataclass(frozen=True)
class Job:
    """Everything that a stage trains with."""

    engine: Engine
    loader: Any
    """Endless iterable of `PackedBatch`, with ``state_dict``, its position, and ``max_bad_share``."""
    validation: Mapping[str, Any]
    """Metric name -> loader of a fixed set of batches, with ``max_bad_share``."""
    schedule: Schedule
    training: TrainingConfig
    metrics: MetricsLog
    meter: Meter
    pace: Pace
    flops: FlopCounter
    patch_size: int
    world: World
    device: torch.device
    checkpoints: CheckpointWriter
    attempt: Attempt
    questions: Questions | None = None
    """What the model is asked at every validation."""
    maps: SampleMaps | None = None
    """The held-out sample that is looked at every ``training.maps_interval`` steps."""
    profile: StepProfile | None = None
    """On rank 0, where ``training.profile`` names steps."""


def train(job: Job, first_step: int) -> int:
    """Run the steps that are left, validating, logging and saving at the recipe's intervals and at the end.

    Returns:
        The steps done: all, or fewer where the attempt was asked to stop; there is a checkpoint of them.

    Raises:
        HiveError: too many steps in a row had a gradient that is not finite, too many samples are bad, or another
            attempt has taken over.
    """
    batches, steps, skipped_in_row, done = iter(job.loader), job.schedule.steps, 0, first_step
    bar = tqdm(total=steps, initial=first_step, unit="step", disable=not job.world.is_main, dynamic_ncols=True)
    job.meter.restart()
    ahead: Fetched | None = None
    totals, waited = Totals(), 0.0
    left: Iterable[int] = range(first_step, steps)
    if job.profile is not None:
        left = job.profile.over(range(first_step, steps), job.engine.model)
    for step in left:
        done = step + 1
        here.begin_step(done)
        if ahead is None:
            ahead = fetch(job, batches)
            totals = Totals(*sum_over_ranks(ahead.own.vector(), job.device))
            waited = totals.wait
        micro_batches = ahead.micro_batches
        mapped = job.maps is not None and done % job.training.maps_interval == 0
        watch: Any = watched_gradients(job.engine.model) if mapped else nullcontext()
        with watch as squares:
            loss = run_micro_batches(job.engine, micro_batches, totals.supervised)
        ahead = fetch(job, batches) if done < steps else None  # ZeRO 0 and 1: a GPU is still at work
        position = job.loader.state_dict() if ahead is None else ahead.position
        here.enter("step")
        with record_function("part:optimizer"):
            sums = add_up(job, loss, ahead)
            report = job.engine.step(job.schedule.factor(step), sums.squares)
        waited += sums.ahead.wait  # which passed in this step
        job.meter.add(replace(totals, wait=waited), math.nan if report.skipped else sums.loss)
        waited = 0.0
        _watch_bad_samples(job, done, micro_batches, totals)
        skipped_in_row = _watch_skips(job, done, report, micro_batches, skipped_in_row)
        bar.update()
        if done % job.training.log_interval == 0 or done == steps:
            _log(job, done, report, bar)
        if _due(done, job.training.validation_interval, steps):
            _validate(job, done)
        if mapped:
            _map(job, done, squares)
        _report_save(job, job.checkpoints.advance(sums.agreed.writing))
        if sums.agreed.stop or _due(done, job.training.checkpoint_interval, steps):
            _save(job, done, position, last=sums.agreed.stop or done == steps)
        if sums.agreed.stop:
            break
        totals = sums.ahead
    bar.close()
    return done


def evaluate(job: Job, loader: Any) -> float:
    """Mean loss over supervised tokens of the first ``training.validation_samples`` of ``loader``, over all ranks.

    Raises:
        HiveError: too many of its samples are bad.
    """
    count = min(job.training.validation_samples, loader.num_samples)
    loss, tokens, bad = torch.zeros((), dtype=torch.float64, device=job.device), 0.0, []
    job.engine.model.eval()
    for batch in loader.first(count):
        here.enter("validation", batch.sample_ids)
        output = job.engine.forward(**batch.model_inputs(job.device, job.engine.dtype), num_items_in_batch=1)
        loss += output.loss.detach()
        tokens += batch.supervised_tokens
        bad += batch.bad
    job.engine.model.train()
    loss_sum, tokens, num_bad = sum_over_ranks([float(loss), tokens, len(bad)], job.device)
    if num_bad:
        check_bad_share(num_bad, count, loader.max_bad_share, _of_all_ranks(bad))
    return loss_sum / max(tokens, 1)


def _save(job: Job, done: int, position: Mapping[str, Any], *, last: bool) -> None:
    """Begin a checkpoint, once the one before is there; the last one is waited for.

    Args:
        job: of the stage.
        done: steps.
        position: of the loader behind them.
        last: the run ends here.
    """
    here.enter("save", ())
    job.meter.pause()
    _report_save(job, job.checkpoints.wait())
    counts = {"cut_samples": job.meter.cut_samples, "bad_samples": job.meter.bad_samples}
    job.checkpoints.begin(done, {**position, "counts": counts})
    if last:
        _report_save(job, job.checkpoints.wait(), last=True)
    job.meter.restart()


def _report_save(job: Job, save: SaveReport | None, *, last: bool = False) -> None:
    """Log a checkpoint. Where it failed the run goes on with the one before, unless it has nothing else to do.

    Raises:
        OutsideError: it failed, and the run was to stop here or the recipe says that it should.
    """
    if save is None:
        return
    seconds = {"seconds": save.seconds, "blocked_seconds": save.blocked_seconds}
    job.metrics.write("checkpoint", save.step, **seconds, failed=save.failed)
    if save.failed is not None:
        message = f"step {save.step}: no checkpoint could be written ({save.failed}); earlier ones are untouched"
        if last or job.training.stop_on_failed_save:
            raise OutsideError(message)
        if job.world.is_main:
            tqdm.write(f"warning: {message}, training goes on")


def run_micro_batches(engine: Engine, micro_batches: Sequence[Any], supervised: float) -> Tensor:
    """Forward and backward over one step's micro-batches.

    Args:
        engine: takes the gradients.
        micro_batches: this rank's `PackedBatch`es of the step.
        supervised: tokens with a label on all ranks, over the whole step.

    Returns:
        Scalar, not waited for: its mean over ranks is the mean loss over all supervised tokens of the step.
    """
    # Gradients are averaged over ranks and summed over micro-batches, hence this share of the tokens.
    items = max(supervised, 1) / engine.world.size
    loss = torch.zeros((), device=engine.device)
    for index, batch in enumerate(micro_batches):
        here.enter("forward", batch.sample_ids)
        output = engine.forward(**batch.model_inputs(engine.device, engine.dtype), num_items_in_batch=items)
        here.enter("backward")
        engine.backward(output.loss, last=index == len(micro_batches) - 1)
        loss += output.loss.detach()
    return loss


def _watch_skips(job: Job, done: int, report: StepReport, micro_batches: list[Any], in_row: int) -> int:
    """Log a skipped step with the samples of every rank; returns how many were skipped in a row."""
    if not report.skipped:
        return 0
    own = [sample for batch in micro_batches for sample in batch.sample_ids]
    sample_ids = all_values(own)
    job.metrics.write("skipped_step", done, sample_ids=sample_ids, grad_norms=report.grad_norms)
    if in_row + 1 >= job.training.max_skipped_steps:
        raise HiveError(
            f"step {done}: the gradient was not finite for {in_row + 1} steps in a row (training.max_skipped_steps); "
            f"samples of the last one, by rank: {sample_ids}; a restart would come to the same steps"
        )
    return in_row + 1


def _watch_bad_samples(job: Job, done: int, micro_batches: list[Any], totals: Totals) -> None:
    """Log the bad samples of a step, of every rank; HiveError, on every rank, where the run has met too many."""
    if totals.bad:  # the same on every rank
        found = _of_all_ranks([bad for batch in micro_batches for bad in batch.bad])
        job.metrics.write("bad_samples", done, samples=[asdict(bad) for bad in found])
        check_bad_share(job.meter.bad_samples, job.meter.samples, job.loader.max_bad_share, found)


def _of_all_ranks(own: list[BadSample]) -> list[BadSample]:
    return [bad for rank in all_values(own) for bad in rank]


def _log(job: Job, done: int, report: StepReport, bar: Any) -> None:
    rates = job.engine.learning_rates()
    values: dict[str, Any] = job.meter.read(job.schedule.steps - done)
    values |= job.pace.compare(values["seconds_per_step"], tqdm.write)
    values |= {
        "lr": rates,
        "grad_norm": report.grad_norm,
        "grad_norms": report.grad_norms,
        "skipped_steps": job.engine.skipped_steps,
    }
    job.metrics.write("train", done, **values)
    if job.world.is_main:
        events = {f"train/{name}": values[name] for name in LISTED_IN_MONITOR}
        events |= {f"lr/{name}": rate for name, rate in rates.items()}
        events |= {f"grad_norm/{name}": norm for name, norm in report.grad_norms.items()}
        job.engine.write_events(events, done)
        tokens_per_second = values["tokens_per_second_per_gpu"] * job.world.size
        bar.set_postfix(
            loss=f"{values['loss']:.3f}", lr=f"{max(rates.values()):.1e}", tokens_per_s=f"{tokens_per_second:.0f}"
        )


def _validate(job: Job, done: int) -> None:
    job.meter.pause()
    losses = {name: evaluate(job, loader) for name, loader in job.validation.items()}
    if losses:
        job.metrics.write("validation", done, **losses)
        if job.world.is_main:
            job.engine.write_events({f"validation/{name}": loss for name, loss in losses.items()}, done)
    if job.questions is not None:
        here.enter("questions", ())
        job.engine.gather_parts()
        answers = job.questions.ask(job.engine.model)
        job.metrics.write("answers", done, **answers)
        if job.world.is_main:
            job.engine.write_events({"validation/answers": answers["share"]}, done)
    job.meter.restart()


def _map(job: Job, done: int, squares: Mapping[int, Tensor]) -> None:
    """Log the gradient norms of this step's batch and of the held-out sample, by block, and draw the sample's maps.

    Args:
        job: with maps.
        done: steps, this one included.
        squares: squared norms of this rank's gradients, of all micro-batches.
    """
    assert job.maps is not None
    here.enter("maps", ())
    job.meter.pause()
    start = time.perf_counter()
    norms = norms_over_ranks(squares, job.engine)
    own = {"sample_id": job.maps.sample.id, "sample_grad_norms": job.maps.draw(job.engine, done)}
    job.metrics.write("maps", done, block_grad_norms=norms, **own, seconds=time.perf_counter() - start)
    if job.world.is_main:
        job.engine.write_events({f"block_grad_norm/{block}": norm for block, norm in norms.items()}, done)
    job.meter.restart()


def _due(done: int, interval: int, steps: int) -> bool:
    return done == steps or (interval > 0 and done % interval == 0)
