"""``hive-ds probe ...``: how well frozen encoders tell classes apart, block by block."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hive_ds.cli_parts import command, split_name
from hive_ds.errors import HiveError

if TYPE_CHECKING:
    from hive_ds.evaluation.probes.settings import HeadSettings


def add_probe_command(commands: Any) -> None:
    """Add ``probe`` to the command line."""

    def run(args: argparse.Namespace) -> None:
        from hive_ds.evaluation.probes.cache import FeatureCache
        from hive_ds.evaluation.probes.encoder import load_encoder
        from hive_ds.evaluation.probes.features import ExtractSettings
        from hive_ds.evaluation.probes.report import ProbeReport
        from hive_ds.evaluation.probes.settings import ProbeSettings
        from hive_ds.evaluation.probes.sources import open_data
        from hive_ds.evaluation.probes.sweep import probe

        settings = ProbeSettings(_head(args), _blocks(args.blocks), tuple(range(args.seeds)))
        extract = ExtractSettings(args.encode_batch, args.workers, args.store)
        named = _named(args.encoders)
        data = open_data(_data_options(args))
        cache = None if args.cache == "none" else FeatureCache(args.cache)
        encoders, results = [], []
        for name, source in named.items():
            encoder = load_encoder(source, name, device=args.device, dtype=args.dtype)
            results += probe(encoder, data, settings, extract=extract, cache=cache)
            encoders.append(encoder.info)
        report = ProbeReport(data, settings, encoders, results)
        report.print()
        if args.out:
            report.write(args.out)
            print(f"wrote {args.out}/probes.json and {args.out}/probes.html")

    parser = command(
        commands,
        "probe",
        run,
        "train small heads on frozen encoders and say how well they classify, block by block",
        "Features of all blocks are computed in one pass, kept in the cache, and used by every head and seed.",
    )
    parser.add_argument(
        "encoders",
        metavar="[NAME=]ENCODER",
        nargs="+",
        help="encoder's folder or Hugging Face name, or folder of a run, a stage or a model; NAME heads its column",
    )
    _add_data_options(parser)
    _add_head_options(parser)
    _add_run_options(parser)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="DATA",
        required=True,
        help="folder of class folders (or train/ and test/ of them), folder saved by datasets or of .parquet files,"
        " preset, or name on the Hugging Face hub",
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="food101, caltech256, imagenet1k, cifar10, cifar100, stanford_cars or oxford_pets: splits, columns and"
        " epochs, for a copy that --data names",
    )
    group.add_argument("--train-split", metavar="NAME", help="to train the heads on (default: the preset's, or train)")
    group.add_argument(
        "--test-split",
        metavar="NAME",
        help="to score (default: the preset's, test, validation or val; without one, or for none, every seed holds out"
        " a part)",
    )
    group.add_argument("--test-share", type=float, metavar="X", default=0.2, help="held out (default: %(default)s)")
    group.add_argument(
        "--image-column", metavar="NAME", help="images of a Hugging Face dataset, where they are not found"
    )
    group.add_argument("--label-column", metavar="NAME", help="its classes, likewise")


def _add_head_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("head")
    group.add_argument(
        "--head",
        choices=("linear", "attentive", "knn"),
        default="linear",
        help="linear and knn on the mean over patches, attentive on all patches (default: %(default)s)",
    )
    group.add_argument(
        "--blocks",
        metavar="B",
        default="penultimate",
        help="all, last, penultimate, or numbers from 1 as 2,5,8 (default: %(default)s)",
    )
    group.add_argument("--seeds", type=int, metavar="N", default=3, help="runs, seeds 0 to N-1 (default: %(default)s)")
    group.add_argument("--l2", type=float, metavar="X", help="linear: fixed, not chosen on held-out training images")
    group.add_argument("--k", type=int, metavar="N", help="knn: neighbours (default: 20)")
    group.add_argument("--temperature", type=float, metavar="X", help="knn: of the votes (default: 0.07)")
    group.add_argument("--epochs", type=int, metavar="N", help="attentive (default: the preset's, or 5)")
    group.add_argument("--lr", type=float, metavar="X", help="attentive (default: 2e-4)")
    group.add_argument("--batch-size", type=int, metavar="N", help="attentive (default: 512)")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="OUT", type=Path, help="folder for probes.json and probes.html")
    group.add_argument(
        "--cache", metavar="FOLDER", default="runs/probe_cache", help="of features, or none (default: %(default)s)"
    )
    group.add_argument(
        "--store", choices=("fp32", "fp16"), default="fp32", help="how features are kept (default: %(default)s)"
    )
    group.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="the encoder computes in (default: %(default)s)",
    )
    group.add_argument("--device", help="(default: a GPU where there is one)")
    group.add_argument("--workers", type=int, metavar="N", default=0, help="processes that decode (default: none)")
    group.add_argument(
        "--encode-batch", type=int, metavar="N", default=64, help="images at once (default: %(default)s)"
    )


def _named(encoders: list[str]) -> dict[str, str]:
    """Name -> source."""
    named: dict[str, str] = {}
    for given in encoders:
        name, source = split_name(given)
        name = Path(given).name if name is None else name
        if not name or not source:
            raise HiveError(f"encoder {given!r}: expected ENCODER or NAME=ENCODER")
        if name in named:
            raise HiveError(f"encoder {given}: there is another one named {name!r}; write NAME={source}")
        named[name] = source
    return named


def _blocks(text: str) -> str | tuple[int, ...]:
    parts = text.split(",")
    return tuple(map(int, parts)) if all(part.strip().isdecimal() for part in parts) else text


def _head(args: argparse.Namespace) -> HeadSettings:
    """The head's settings; an option of another head is an error."""
    from hive_ds.evaluation.probes import settings

    options = {
        "linear": (settings.LinearSettings, ("l2",)),
        "attentive": (settings.AttentiveSettings, ("epochs", "lr", "batch_size")),
        "knn": (settings.KnnSettings, ("k", "temperature")),
    }
    given = {name: value for _, names in options.values() for name in names if (value := vars(args)[name]) is not None}
    kind, own = options[args.head]
    for name in given:
        if name not in own:
            raise HiveError(f"--{name.replace('_', '-')}: is no option of the {args.head} head")
    if args.head == "attentive" and (epochs := _preset_epochs(args)) is not None:
        given = {"epochs": epochs, **given}
    return kind(**given)


def _preset_epochs(args: argparse.Namespace) -> int | None:
    from hive_ds.evaluation.probes.sources import find_preset_of

    preset = find_preset_of(_data_options(args))
    return None if preset is None else preset.epochs


def _data_options(args: argparse.Namespace) -> Any:
    from hive_ds.evaluation.probes.sources import DataOptions

    return DataOptions(
        args.data,
        args.preset,
        args.train_split,
        args.test_split,
        args.image_column,
        args.label_column,
        args.test_share,
    )
