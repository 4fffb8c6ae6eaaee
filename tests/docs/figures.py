"""Where every figure of README and docs comes from: a row for each, or for each sentence that holds some.

A new figure needs a row here: `Measured` from a result file where there is one, else what fits it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comparison_figures import COMPARISON_FIGURES
from cpu_figures import CPU_FIGURES
from gpu_figures import gpu_figures
from reckoned import LIMITS, caption_figures, encoder_share

Path = tuple[Any, ...]
"""Keys and places that lead to a value; a mapping stands for the item of a list that has its values."""
QUICKSTART = "docs/results/quickstart.json"
START_MEMORY = "docs/results/start_memory.json"
COST = "docs/results/cost_paper.json"
PAPER = "the paper, arXiv 2604.00086"
GOAL = "a goal, not a measurement"


@dataclass(frozen=True)
class Measured:
    """Figures that stand in a result file."""

    page: str
    text: str
    """Regular expression of the words around the figures, with a group for each."""
    file: str
    paths: tuple[Path, ...]
    """Keys of each figure in the file, one path a group."""
    scale: float = 1
    """What a figure of the file is multiplied by to be in the page's unit."""


@dataclass(frozen=True)
class Logged:
    """Figures that an entry of the lab log has, in the same digits."""

    page: str
    text: str
    entry: str
    """Its heading in docs/lab_log.md, or a part that no other has."""


@dataclass(frozen=True)
class Reckoned:
    """Figures that follow from others."""

    page: str
    text: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Chosen:
    """Figures that the code sets."""

    page: str
    text: str
    file: str
    source: str
    """What stands in that file; compared with the page by eye, when one of them changes."""


@dataclass(frozen=True)
class Cited:
    """Figures of others, or of no measurement at all."""

    page: str
    text: str
    origin: str


@dataclass(frozen=True)
class FromFile:
    """All figures below a heading stand in one result file, in any of the usual units: for whole tables."""

    page: str
    heading: str
    file: str


def _row(name: str, column: int) -> Path:
    """Place of a cell in the quickstart's table."""
    return ("table", ["colour", "shape", "size", "count", "relation", "text", "all"].index(name) + 1, column)


def _knocked_out(text: str, name: str) -> Measured:
    """Changes of the loss without each of a model's three routes."""
    paths = tuple(("models", {"checkpoint": name}, "routes", route, "change") for route in range(3))
    return Measured("docs/analysis.md", text, "docs/results/flow.json", paths)


def _saved(text: str, setup: str, scale: float = 100, **place: int) -> Measured:
    """Share of SA's peak memory that HIVE saves at one place of the cost's curves."""
    return Measured("docs/cost.md", text, COST, (("curves", "memory", place, "saved", setup),), scale)


def _memory(row: str, *gigabytes: float) -> Reckoned:
    return Reckoned("ds_configs/README.md", row, gigabytes)


N, M, R = 1.0, 8.0, 8
"""Billions of parameters of the two columns of ds_configs/README.md, and ranks."""


FIGURES: tuple[Measured | Logged | Reckoned | Chosen | Cited | FromFile, ...] = (
    Measured(
        "README.md",
        r"(\d+) % of (\d+) held-out questions are answered right, (\d+) % when the pictures are shuffled",
        QUICKSTART,
        (_row("all", 1), _row("all", 6), _row("all", 3)),
    ),
    Measured("README.md", r"\(\+([\d.]+) points\)", QUICKSTART, (("margin_points",),)),
    Measured("README.md", r"([\d.]+) minutes on 2 CPU cores", QUICKSTART, (("seconds_total",),), 1 / 60),
    Measured("README.md", r"three stages \((\d+) to 7 minutes on 2 cores", QUICKSTART, (("seconds_total",),), 1 / 60),
    Logged("README.md", r"three stages \(4 to (7) minutes on 2 cores", "garbage collections"),
    Logged("README.md", r"runs the tests \((9) to 32 minutes on 2 cores", "waited for no one"),
    Logged("README.md", r"runs the tests \(9 to (32) minutes on 2 cores", "garbage collections"),
    Logged("README.md", r"comes to (52) % and (20) % \(\+(31.7)\)", "by processor"),
    Logged("README.md", r"to (50) % \(\+(28.0)\) and (57) % \(\+(35.2)\)", "by processor"),
    Cited("README.md", r"about 9 GB of disk", "the environment's 7.8 GB of the lab log, and room for runs"),
    Cited("CONTRIBUTING.md", r"about 9 GB of disk", "as README.md"),
    Logged("docs/cost.md", r"hands out the same within (0.5) %", "asked of CUDA's allocator"),
    Logged("docs/cost.md", r"between (0.5) % more and (5) % less under", "asked of CUDA's allocator"),
    Cited("docs/ablations.md", r"95 % intervals", "a choice"),
    Reckoned("docs/ablations.md", r"after (\d+) minutes for scenes", ((52.0 + 600.7) / 60,)),  # seconds_by_step
    Reckoned(
        "docs/analysis.md",
        r"HIVE's gradient is ([\d.]+) times SA's and ([\d.]+) times last's",
        (8.433 / 3.291, 8.433 / 4.046),  # docs/results/flow.json, 1e-4
    ),
    _knocked_out(r"costs ([\d.]+) nats, from block 2 ([\d.]+), from block 3 ([\d.]+)", "HIVE"),
    _knocked_out(r"worth much the same \(([\d.]+), ([\d.]+), ([\d.]+)\)", "last"),
    *(Measured(*row) for row in COMPARISON_FIGURES),
    Reckoned("README.md", r"for (\d+) % of\s+the model FLOPs", (100 * 3.19 / 5.38,)),
    Reckoned("docs/ablations.md", r"(\d+) % of the model FLOPs of SA", (100 * 3.19 / 5.38,)),
    Cited("README.md", r"the paper's 0.14x FLOPs, -59.3 % memory and 3.4x speed", PAPER),
    Chosen("docs/cluster.md", r"/dev/shm \(0.25 GB a rank\)", "hive_ds/launch/probe.py", "SHM_PER_RANK = 0.25e9"),
    Chosen("docs/cluster.md", r"ended after 45 s", "hive_ds/doctor/trials.py", "PATIENCE = 45.0"),
    Chosen("docs/report.md", r"some 400 points", "hive_ds/plots.py", "most: int = 400"),
    Cited("docs/planning.md", r"\d+ x \d+, \d+ GB", "predicted; tests/planning/test_zero_defaults.py compares it"),
    Measured(
        "docs/planning.md",
        r"Under `zero3` rank 0 needed ([\d.]+) GiB and the others ([\d.]+) to ([\d.]+) GiB",
        START_MEMORY,
        tuple(("mib", "stage 2, zero3, 4 ranks", rank) for rank in (0, 2, 1)),
        1 / 1024,
    ),
    Measured(
        "docs/planning.md",
        r"under `zero2` ([\d.]+) GiB and ([\d.]+) to ([\d.]+) GiB",
        START_MEMORY,
        tuple(("mib", "stage 2, zero2, 4 ranks", rank) for rank in (0, 2, 1)),
        1 / 1024,
    ),
    Logged("docs/planning.md", r"all needed (1.84) to (1.86) GiB", "rank 0 alone reads"),
    Chosen("docs/planning.md", r"at most 90 % of the GPU", "hive_ds/planning/timing.py", "usable_memory: float = 0.9"),
    Chosen("docs/performance.md", r"and for 1.5 s; the median", "hive_ds/benchmarks/step.py", "SECONDS = 1.5"),
    Chosen("docs/performance.md", r"pieces of about 256 MiB", "hive_ds/model/language_loss.py", "LOGITS_BYTES = 2**28"),
    Chosen(
        "docs/performance.md",
        r"the loss within 0.5 % in bf16",
        "hive_ds/benchmarks/agreement.py",
        "LOSS_LIMITS = {torch.bfloat16: 5e-3,",
    ),
    *(
        Cited("docs/performance.md", text, GOAL)
        for text in (
            r"at least 1.5 times the images/s",
            r"MFU of 45 %",
            r"at most 10 % of the step",
            r"waiting for data below 1 %",
        )
    ),
    *(Measured(*row) for row in CPU_FIGURES),
    Logged("docs/performance.md", r"between (1.93) and (2.25) times", "garbage collections"),
    Logged("docs/performance.md", r"without the last changes of the loader, (1.87)\.", "what prefetching hides"),
    Logged(
        "docs/performance.md",
        r"needs (0.098) s of CPU time for stage 3's micro-batch of 16, ZeRO-0\s+(0.107) s; ZeRO-3 needed (0.163) s",
        "The training step",
    ),
    Reckoned(
        "docs/performance.md",
        r"drawn from (\d+) real captions of Florence-2-large \(`<MORE_DETAILED_CAPTION>`; (\d+) to (\d+) tokens with "
        r"their end, quartiles (\d+), (\d+) and ([\d.]+)\)",
        caption_figures("Florence-2, more detailed"),
    ),
    Reckoned(
        "docs/performance.md",
        r"detailed captions have (\d+) tokens in the median, CC3M's alt-texts (\d+)",
        (caption_figures("Florence-2, detailed")[4], caption_figures("CC3M")[4]),
    ),
    *(Reckoned(*row) for row in (*gpu_figures(), *LIMITS)),
    Cited("docs/performance.md", r"The paper's 3.4 times and 41 % of the memory", "arXiv 2604.00086"),
    Logged("docs/performance.md", r"stage 3 fell from (69) to (39) ms", "what the host does for a step"),
    Logged(
        "docs/performance.md",
        r"(10) ms a gather, a step waits for (253) of (260) ms with nothing asked for ahead, and for (32) of (130) ms",
        "what prefetching hides",
    ),
    Reckoned("docs/performance.md", r"Memory takes ([\d.]+) times as long on an H100", (4.8 / 3.35,)),
    Reckoned(
        "docs/performance.md",
        r"(\d+) % of the products of stage 1 and (\d+) % of those of stage 3",
        (encoder_share(1), encoder_share(3)),
    ),
    Cited("docs/evaluation.md", r"95 % interval", "a choice"),
    Cited("docs/probes.md", r"95 % interval", "a choice"),
    Chosen("docs/cluster.md", r"10 minutes before the time limit", "slurm/stage1.sh", "B:USR1@600"),
    Cited("docs/cluster.md", r"time limit of less than 20 minutes", "the signal's 10 minutes, and as much for a start"),
    Chosen("docs/cluster.md", r"does not answer `STOP` for 8 minutes", "slurm/body.sh", "HIVE_STOP_PATIENCE:-480"),
    Chosen("docs/cluster.md", r"have 1 GB free", "hive_ds/launch/preflight.py", "ROOM = 10**9"),
    Chosen("docs/cluster.md", r"/dev/shm has 0.25 GB a rank", "hive_ds/launch/probe.py", "SHM_PER_RANK = 0.25e9"),
    Chosen("docs/cluster.md", r"clocks within 5 s", "hive_ds/launch/preflight_verdict.py", "CLOCK_SKEW = 5.0"),
    Chosen("docs/cluster.md", r"exchanges 64 MB", "hive_ds/launch/preflight_network.py", "SIZE = 64 << 20"),
    Logged(
        "docs/cluster.md",
        r"gone after (8\.0) s with `deepspeed`, (6\.7) s",
        "Every launcher, and nodes tried before training",
    ),
    Chosen("docs/cluster.md", r"64 MB of /dev/shm", "tests/cluster/test_preflight.py", "64m"),
    Chosen("docs/data.md", r"`--max-reject-share` \(5 %\)", "hive_ds/cli_data.py", "default=0.05"),
    Chosen("docs/export.md", r"[Ww]eights above 5 GB are sharded", "hive_ds/export/formats.py", 'SHARD_SIZE = "5GB"'),
    Logged("docs/data.md", r"that wait fell from (0\.67) to (0\.013) of the mean work", "Loader"),
    Cited("docs/export.md", r"encoders above 5 GB", "as above"),
    Cited("docs/install.md", r"3 to 5 minutes on 64 cores with ninja and 2 hours", "flash-attn's own README"),
    Chosen("docs/kernel.md", r"a 256 MiB buffer", "kernels/benchmarks/timing.py", "FLUSH_BYTES = 2**28"),
    Reckoned(
        "docs/probes.md",
        r"one block \| ([\d.]+) GB \| ([\d.]+) TB, with `--store fp16` ([\d.]+) TB",
        (1.28e6 * 4 * 1024 / 1e9, 1.28e6 * 4 * 1024 * 576 / 1e12, 1.28e6 * 2 * 1024 * 576 / 1e12),
    ),
    Reckoned(
        "docs/probes.md",
        r"the same \| ([\d.]+) GB \| ([\d.]+) TB, with `--store fp16` ([\d.]+) TB",
        (101e3 * 4 * 1024 / 1e9, 101e3 * 4 * 1024 * 576 / 1e12, 101e3 * 2 * 1024 * 576 / 1e12),
    ),
    Chosen(
        "docs/training.md",
        r"1e-3, cosine to 10 %",
        "hive_ds/recipes/hive-siglip-l-mobilellm-600m.yaml",
        "min_lr_ratio: 0.1",
    ),
    Chosen(
        "docs/training.md",
        r"1e-4, cosine to 10 %",
        "hive_ds/recipes/hive-siglip-l-mobilellm-600m.yaml",
        "min_lr_ratio: 0.1",
    ),
    _memory(r"`zero0` \|[^|]*\| \| ([\d.]+) GB \| ([\d.]+) GB", 18 * N, 18 * M),
    _memory(r"`zero1` \|[^|]*\| \| ([\d.]+) GB \| ([\d.]+) GB", 4 * N + 12 * N / R, 4 * M + 12 * M / R),
    _memory(r"`zero2` \|[^|]*\| \| ([\d.]+) GB \| ([\d.]+) GB", 2 * N + 16 * N / R, 2 * M + 16 * M / R),
    _memory(r"`zero3` \|[^|]*\| \| ([\d.]+) GB \| ([\d.]+) GB", 18 * N / R, 18 * M / R),
    _memory(r"\+ (\d+) GB / L \| \+ (\d+) GB / L", 2 * N, 2 * M),
    _memory(
        r"`zero3_offload_optimizer` \|[^|]*\|[^|]*\| ([\d.]+) GB, CPU ([\d.]+) GB \| ([\d.]+) GB, CPU ([\d.]+) GB",
        *(2 * N / R, 20 * N / R, 2 * M / R, 20 * M / R),
    ),
    _memory(r"CPU (2\.\d) GB \| CPU (22) GB", 22 * N / R, 22 * M / R),
    _memory(r"5e8 elements: (\d) GB in bf16", 5e8 * 2 / 1e9),
    _memory(r"such a model whole \(below\): (\d) GB more", 2 * N),
    _memory(r"15.5e9 parameters: (\d+) GB", 4 * 15.5),
    Cited(
        "ds_configs/README.md",
        r"1\.4 ns a parameter and thread, against 6\.2",
        "timed by a script that was not kept; the page names the machine",
    ),
    _memory(
        r"8 threads each are about ([\d.]+) s, at one thread each about ([\d.]+) s",
        1e9 / 8 / 8 * 1.4e-9,
        1e9 / 8 * 1.4e-9,
    ),
    Cited("README.md", r"0\.14x FLOPs, -59\.3 % memory and 3\.4x speed", "arXiv 2604.00086"),
    Cited("docs/cost.md", r"0\.14x training FLOPs, 59\.3 % less peak memory, 3\.4x faster", "arXiv 2604.00086"),
    Cited("docs/cost.md", r"routes at 25 % of the layers", "arXiv 2604.00086"),
    Cited("docs/cost.md", r"-59\.3 % (?:peak )?memory", "arXiv 2604.00086"),
    Cited("docs/cost.md", r"59\.3 % lies at a batch between", "arXiv 2604.00086"),
    Chosen("docs/cost.md", r"agree within 1 % in every test", "tests/cost/test_cost_flops.py", "rel=0.01"),
    Reckoned("docs/cost.md", r"closed form: ([\d.]+) % at 576 patches", (100 / 577,)),
    Reckoned("docs/cost.md", r"0\.37 TFLOPs a sample, (\d+) % of SA's 1\.95", (100 * 0.3656 / 1.9498,)),
    _saved(r"HIVE saves (\d+) % and more", "8 GPUs, ZeRO-3", stage=2, routes=8, text_length=128, batch=32),
    _saved(r"leave (\d+) % at most", "8 GPUs, ZeRO-3", stage=3, routes=6, text_length=32, batch=32),
    _saved(r"HIVE takes ([\d.]+) % \*more\*", "one GPU", -100, stage=2, routes=8, text_length=64, batch=1),
)
"""Every row is found on its page, and every figure with a unit, of every page but the log, in a row."""
