"""The examination: everything at once, because most of it waits."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from hive_ds.config import Recipe
from hive_ds.doctor.findings import Diagnosis, Finding
from hive_ds.doctor.folders import STAGES_4_AND_5, check_data, check_models, check_routes, check_run, data_folders
from hive_ds.doctor.machine import CPU_RANKS, check_disk, check_machine, count_gpus
from hive_ds.doctor.software import check_software
from hive_ds.doctor.trials import check_trials
from hive_ds.errors import HiveError
from hive_ds.launch.hostfile import Host
from hive_ds.launch.hosts import PORT, check_hosts

HOST_PATIENCE = 40.0
"""Seconds that a host may take to answer: the doctor is done within a minute."""
_FLASH = "flash_attention_2"


@dataclass(frozen=True)
class Patient:
    """What is to be looked at."""

    hosts: Sequence[Host] = ()
    recipe: Recipe | None = None
    run: Path | None = None
    data: str | None = None
    port: int = PORT


def examine(patient: Patient) -> Diagnosis:
    """Look at everything, in the order of the report."""
    started = time.monotonic()
    gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else count_gpus()
    folder = _existing(patient.run)
    with ThreadPoolExecutor(max_workers=2) as pool:
        trials = pool.submit(lambda: list(check_trials(gpus)))
        hosts = pool.submit(lambda: list(_hosts(patient, folder)))
        findings = [
            *check_software(flash_needed=_needs_flash(patient.recipe)),
            *check_machine(gpus or CPU_RANKS, None if patient.hosts else patient.port),
            *check_disk(folder),
            *_recipe(patient, gpus),
            *(check_run(patient.run) if patient.run is not None and patient.run.is_dir() else ()),
        ]
        findings += trials.result() + hosts.result()
    stages = () if patient.recipe is None else tuple(patient.recipe.stages)
    return Diagnosis(findings, time.monotonic() - started, stages)


def _existing(run: Path | None) -> Path:
    """The folder of the run, or what is there of the way to it."""
    path = Path() if run is None else run
    return next((one for one in (path, *path.absolute().parents) if one.exists()), path)


def _needs_flash(recipe: Recipe | None) -> bool:
    return recipe is not None and _FLASH in (recipe.model.text_attention_backend, recipe.model.vision_attention)


def _recipe(patient: Patient, gpus: int) -> Iterator[Finding]:
    if patient.data is not None:
        yield check_data(patient.data, "--data")
    if patient.recipe is None:
        return
    for folder, named in data_folders(patient.recipe).items():
        if not (patient.data is not None and named.key == "data.train"):
            found = replace(check_data(folder, named.key), stages=named.stages)
            if found.status == "problem" and set(named.stages) <= set(STAGES_4_AND_5):
                left_out = " ".join(f"--set stages.{stage}=null" for stage in named.stages)
                found = replace(found, advice=f"{found.advice}; or leave that stage out with {left_out}")
            yield found
    yield from check_models(patient.recipe)
    yield from check_routes(patient.recipe)
    ranks = sum(host.slots for host in patient.hosts) or gpus
    if ranks:
        yield from check_batches(patient.recipe, ranks)


def check_batches(recipe: Recipe, ranks: int) -> Iterator[Finding]:
    """Whether the ranks divide each stage's global batch."""
    from hive_ds.training.global_batch import fit_micro_batch

    for name, stage in recipe.stages.items():
        try:
            fitted = fit_micro_batch(stage, ranks)
        except HiveError as error:
            advice = f"use another number of ranks, or --set stages.{name}.global_batch_size"
            yield Finding("recipe", name, "problem", str(error), advice, (name,))
        else:
            micro = "auto" if stage.micro_batch_size == "auto" else fitted.micro_batch
            said = f"global batch {stage.global_batch_size} on {ranks} ranks, micro-batch {micro}"
            yield Finding("recipe", name, "ok", said)


def _hosts(patient: Patient, folder: Path) -> Iterator[Finding]:
    if not patient.hosts:
        return
    faults = check_hosts(patient.hosts, folder=folder, port=patient.port, patience=HOST_PATIENCE)
    for host in patient.hosts:
        own = [fault for fault in faults if fault.host == host.name]
        for fault in own:
            yield Finding("hosts", host.name, "problem", fault.what, fault.advice)
        if not own:
            said = f"answers over ssh, same versions, clock and folder, {host.slots} slots"
            yield Finding("hosts", host.name, "ok", said)
