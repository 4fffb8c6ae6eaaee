"""Where a run keeps its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hive_ds.errors import HiveError
from hive_ds.stages import Stage


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
    def model(self) -> Path:
        """Weights, config and processor after the stage."""
        return self.path / "model"

    @property
    def done(self) -> Path:
        """Exists once the stage is finished and its model is written."""
        return self.path / "DONE"

    def start_weights(self) -> Path | None:
        """The previous stage's model; None for stage 1, which starts from the recipe's base models.

        Raises:
            HiveError: the previous stage is not finished.
        """
        if self.stage.number == 1:
            return None
        folder = self.run / f"stage{self.stage.number - 1}"
        if not (folder / "DONE").is_file():
            raise HiveError(
                f"stage {self.stage.number} starts from {folder / 'model'}, but {folder} is not finished (it has no "
                f"file DONE); run stage {self.stage.number - 1} first, with the same --run"
            )
        return folder / "model"
