"""Export the trained vision encoder: read its weights alone, write a folder aside, read it back, then name it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hive_ds.data.images import auto_image_processor
from hive_ds.errors import HiveError, require_one_of
from hive_ds.export import open_clip_format, timm_format, transformers_format
from hive_ds.export.card import PAPER, Section, write_card
from hive_ds.export.formats import Job, Written
from hive_ds.export.parity import check
from hive_ds.export.run_facts import JUDGED_ENCODER
from hive_ds.export.source import Tower, find_source, load_tower
from hive_ds.export.tail import describe_tail, with_tail
from hive_ds.files import whole_folder
from hive_ds.model.identity import folder_sha256, weights_sha256

FORMATS: dict[str, Callable[[Job], Written]] = {
    "transformers": transformers_format.write,
    "timm": timm_format.write,
    "open_clip": open_clip_format.write,
}


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how well it reads back."""

    folder: Path
    model_class: str
    """Of transformers, or the model's name in timm or open_clip."""
    num_blocks: int
    """Of the exported encoder."""
    trained_blocks: int
    """Blocks up to the last routed one, or 0 (see ``untrained``); the others kept the weights they started with."""
    largest_difference: float
    """Between features of routed blocks in training and in the library that the folder is for."""
    precision: str
    """In which they were compared."""
    sha256: str
    """`weights_sha256` of the exported encoder; of a whole one, equal to that in training."""
    trained_sha256: str
    """The same of the encoder in training, its untrained end included."""
    untrained: str | None
    """Why these are weights that no stage has trained, which whoever exports them should hear; None elsewhere."""


def export_encoder(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "transformers",
    tail: str = "keep",
    scores: Path | None = None,
) -> ExportReport:
    """Write the vision encoder of a trained model, with its image processor and a model card, to a new folder.

    It is then read back with the library that it is for: the features of every routed block must equal those in
    training to 1e-5. No weights but the encoder's are read.

    Args:
        source: a run's folder (its last finished stage of 1 to 3 is taken) or a model's. The card says where that
            stage has not trained the encoder.
        out: folder to write; it must not hold files.
        format: ``transformers`` (a stock folder), ``timm`` or ``open_clip``.
        tail: ``keep`` blocks after the last routed one, final norm and pooling head as they were before training, for
            no gradient reaches them; or ``cut`` them.
        scores: a JSON file of results for the model card; None: those in the run that judged this encoder.

    Raises:
        HiveError: no model in ``source``, ``out`` holds files, the encoder has no such form, or the features differ.
    """
    require_one_of("format", format, FORMATS)
    found, out = find_source(source), Path(out)
    tower = load_tower(found.folder)
    trained_sha256 = weights_sha256(tower.encoder.state_dict().items())
    encoder = with_tail(tower, tail)
    sha256 = trained_sha256 if tail == "keep" else weights_sha256(encoder.state_dict().items())
    blocks = tuple(sorted({block for block, _ in tower.routes})) or (tower.last_block,)
    processor = auto_image_processor(found.folder)
    with whole_folder(out) as aside:
        processor.save_pretrained(aside)
        written = FORMATS[format](Job(encoder, blocks, processor, aside, out.name))
        check(written.difference, written.architecture)
        report = ExportReport(
            folder=out,
            model_class=written.architecture,
            num_blocks=encoder.config.num_hidden_layers,
            trained_blocks=tower.last_block if found.untrained is None else 0,
            largest_difference=written.difference,
            precision=written.precision,
            sha256=sha256,
            trained_sha256=trained_sha256,
            untrained=found.untrained,
        )
        if format == "transformers" and folder_sha256(aside) != sha256:
            raise HiveError(f"export to {out}: the weights read back are not those that were written")
        sections = _sections(tower, tail, written, report)
        title = f"Vision encoder {'pre-trained with' if report.untrained is None else 'not yet trained with'} HIVE"
        judged = (JUDGED_ENCODER, {sha256, trained_sha256})
        write_card(aside, title, format, sections, found, scores=scores, judged=judged)
    return report


def _sections(tower: Tower, tail: str, written: Written, report: ExportReport) -> list[Section]:
    routes = ", ".join(f"{block}->{layer}" for block, layer in tower.routes)
    taught = f"Routes (vision block -> LLM layer): {routes}." if routes else f"The LLM saw block {tower.last_block}."
    if report.untrained is None:
        trained = f", trained through a language model ({PAPER})."
    else:
        trained = f". **Not trained: {report.untrained}.**"
    about = f"A `{report.model_class}` of {report.num_blocks} blocks{trained} {taught}"
    end = [] if tail == "keep" and report.untrained is not None else [describe_tail(tower, tail)]
    identity = (
        f"Weights, sha256: `{report.sha256}`\n\nThe same in training: `{report.trained_sha256}`\n\n"
        "Of names, shapes and values in bf16 (`hive_ds.model.identity`): equal in every folder and model that has "
        "these weights, whatever files they are in."
    )
    parity = (
        "Features of the blocks that the LLM saw, read back from this folder, equal those in training to "
        f"{report.largest_difference:.1e} ({report.precision})."
    )
    notes = "\n\n".join([about, *end, parity, *written.notes])
    return [
        Section("What it is", notes),
        Section("Use", f"```python\n{written.usage}\n```"),
        Section("Identity", identity),
    ]
