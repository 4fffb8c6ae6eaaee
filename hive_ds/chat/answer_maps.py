"""Where the model looked while it gave an answer."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from hive_ds.analysis.attention_maps import token_attention_maps
from hive_ds.analysis.attention_pictures import (
    Row,
    Scale,
    attention_figure,
    fitted,
    heat_over,
    seen_part,
    shared_scale,
    token_name,
)
from hive_ds.analysis.maps import AttentionMaps
from hive_ds.chat.conversation import Answer
from hive_ds.chat.loading import ChatModel
from hive_ds.errors import HiveError

VIEW = 640
"""Longer side in pixels of a map by itself."""
MOST_ROWS = 16
"""Of a figure."""


@dataclass(frozen=True)
class AnswerMaps:
    """Maps of an answer.

    Attributes:
        maps: of prompt and answer.
        rows: the whole answer, if it has several tokens, then its tokens. A token's map is that of the token before it,
            which predicted it.
        pictures: what the model saw of each image.
    """

    maps: AttentionMaps
    rows: list[Row]
    pictures: list[Image.Image]

    def figure(self, title: str, *, per_panel: bool = False) -> Image.Image:
        """Rows by layers, as many as are readable; see `attention_figure`."""
        rows = self.rows[:MOST_ROWS]
        if len(rows) < len(self.rows):
            title += f" (first {MOST_ROWS - 1} of {len(self.rows) - 1} tokens)"
        return attention_figure(self.maps, rows, self.pictures, title=title, per_panel=per_panel)

    def panel(self, row: int, layer: int, image: int, *, per_panel: bool = False) -> Image.Image:
        """One map over its picture, on the scale of all rows, layers and images unless ``per_panel``."""
        values = self.rows[row].on_patches(self.maps.layers[layer], image)
        scale = Scale.of([values]) if per_panel else shared_scale(self.maps, self.rows)
        return heat_over(fitted(self.pictures[image], VIEW), values, scale.end)


def answer_maps(chat: ChatModel, answer: Answer) -> AnswerMaps:
    """Run prompt and answer through the model once more and see where it looked, in the mean over heads.

    Raises:
        HiveError: no image, or an empty answer.
    """
    ids = answer.token_ids[0].tolist()
    special = set(chat.processor.tokenizer.all_special_ids)
    said = [place for place in range(answer.prompt_length, len(ids)) if ids[place] not in special]
    if not said:
        raise HiveError("attention map of an empty answer: the model said nothing")
    pixels = dict(answer.inputs)
    (offsets,) = pixels.pop("image_offsets")
    maps = token_attention_maps(chat.model, answer.token_ids, offsets, pixels)
    rows = [Row(token_name(chat.processor.decode([ids[place]])), [place - 1]) for place in said]
    if len(rows) > 1:
        rows.insert(0, Row("whole answer", [place - 1 for place in said]))
    processor = chat.processor.image_processor
    return AnswerMaps(maps, rows, [seen_part(image, processor) for image in answer.images])
