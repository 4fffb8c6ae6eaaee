"""Where a run keeps its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hive_ds.errors import HiveError
from hive_ds.stages import HIVE_STAGES, VLM_STAGES, Stage


@dataclass(frozen=True)
class StageFolder:
    """``RUN/stage{N}``: metrics, recipe, DeepSpeed config, checkpoints, and the model that the stage ends with."""

    run: Path
    stage: Stage

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.run / f"stage{self.stage.number}"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def micro_batch(self) -> Path:
        """What ``micro_batch_size: auto`` has found, and on what."""
        return self.path / "micro_batch.json"

    @property
    def model(self) -> Path:
        """Weights, config and processor after the stage."""
        return self.path / "model"

    @property
    def maps(self) -> Path:
        """Maps of a held-out sample during training, as PNG."""
        return self.path / "maps"

    @property
    def profile(self) -> Path:
        """Traces and summaries of profiled steps."""
        return self.path / "profile"

    @property
    def done(self) -> Path:
        """Exists once the stage is finished and its model is written."""
        return self.path / "DONE"

    def start_weights(self) -> Path | None:
        """The previous stage's model; None for stages 1 and 4, which join two models afresh.

        Raises:
            HiveError: the previous stage is not finished.
        """
        if self.stage.number in (HIVE_STAGES[0].number, VLM_STAGES[0].number):
            return None
        return self.model_of(self.stage.number - 1)

    def model_of(self, number: int) -> Path:
        """The model of an earlier stage, which this one starts from.

        Raises:
            HiveError: that stage is not finished.
        """
        folder = self.run / f"stage{number}"
        if not (folder / "DONE").is_file():
            raise HiveError(
                f"stage {self.stage.number} starts from {folder / 'model'}, but {folder} is not finished (it has no "
                f"file DONE); run stage {number} first, with the same --run"
            )
        return folder / "model"

    @property
    def encoder(self) -> Path:
        """The vision encoder that stages 1 to 3 have trained, as a stock folder."""
        return self.run / "encoder"
