"""Key/value cache of generation: text keys per row, image keys once per prompt.

A row is one running sequence. Several rows (beams, samples) may continue one prompt and then share its image keys:
with R rows to a prompt, row r continues prompt r // R.
Keys are stored finished (normed and rotated). Axes: B row, S slot, G key/value head, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hive_ds.model.inputs import PromptImages


@dataclass
class HiveCache:
    """State of a batch of running sequences.

    Attributes:
        lengths: text tokens stored, per row.
        padded_length: tokens that the caller has fed per row, padding included (what Hugging Face counts).
        images: the prompts' images, set by the call that reads the prompts.
        image_keys: LLM layer -> finished image keys and values (N, G, K) of all prompts.
    """

    lengths: list[int] = field(default_factory=list)
    padded_length: int = 0
    images: PromptImages | None = None
    image_keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _text: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _rows: Tensor | None = None
    _slots: Tensor | None = None
    _capacity: int = 0

    # What Hugging Face's loop asks of a cache; the second since transformers 5.24: does a layer keep a state, not keys?
    is_compileable = False
    is_linear = (False,)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen per row, padding included (Hugging Face's count)."""
        return self.padded_length

    def start(self, new_lengths: list[int], padded: int, device: torch.device) -> None:
        """Make room for ``new_lengths[b]`` tokens of row b; `append_text` then stores them in every layer."""
        if not self.lengths:
            self.lengths = [0] * len(new_lengths)
        counts = torch.tensor(new_lengths, device=device)
        begins = torch.tensor(self.lengths, device=device)
        self._rows = torch.repeat_interleave(torch.arange(len(new_lengths), device=device), counts)
        first = torch.cumsum(counts, 0) - counts
        self._slots = torch.arange(len(self._rows), device=device) - (first - begins)[self._rows]
        self.lengths = [old + new for old, new in zip(self.lengths, new_lengths, strict=True)]
        self.padded_length += padded
        longest = max(self.lengths, default=0)
        if longest > self._capacity:
            self._capacity = max(longest, 2 * self._capacity, 16)

    def forget_padding(self, mask_BS: Tensor | None, *, new: int) -> None:
        """Forget what a row was fed last where a mask of all tokens says padding: its answer had ended early.

        Args:
            mask_BS: 1 on tokens; one that does not cover what was fed, and ``new`` tokens more, changes nothing.
            new: tokens per row that come now.

        Raises:
            ValueError: the mask leaves out a token of which later ones are kept.
        """
        if mask_BS is None or not self.lengths or mask_BS.shape[1] != self.padded_length + new:
            return
        fed = mask_BS[:, : self.padded_length]
        kept = fed.sum(dim=1).tolist()
        for row, (held, left) in enumerate(zip(self.lengths, kept, strict=True)):
            if left < held and fed[row, left - held :].any():
                raise ValueError(
                    f"attention_mask leaves out tokens of row {row} before others; expected 0 at its end only"
                )
        self.lengths = [min(pair) for pair in zip(self.lengths, kept, strict=True)]

    def append_text(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values; returns all of the layer's, (B, S, G, K) each."""
        k_BSGK, v_BSGK = (self._room(layer, index, new) for index, new in enumerate((k_TGK, v_TGK)))
        k_BSGK[self._rows, self._slots] = k_TGK
        v_BSGK[self._rows, self._slots] = v_TGK
        self._text[layer] = (k_BSGK, v_BSGK)
        return k_BSGK, v_BSGK

    def _room(self, layer: int, index: int, new: Tensor) -> Tensor:
        """The layer's buffer, grown to the capacity."""
        old = self._text[layer][index] if layer in self._text else None
        if old is not None and old.shape[1] == self._capacity:
            return old
        grown = new.new_zeros(len(self.lengths), self._capacity, *new.shape[1:])
        if old is not None:
            grown[:, : old.shape[1]] = old
        return grown

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b continue what row ``beam_idx[b]`` of the same prompt, and so as long, has so far (beam search)."""
        self._text = {
            layer: (k.index_select(0, beam_idx.to(k.device)), v.index_select(0, beam_idx.to(v.device)))
            for layer, (k, v) in self._text.items()
        }


def check_cache(cache: object, pixel_values: Tensor | None) -> None:
    """ValueError where ``cache`` is none of ours, or has its images already and more are given."""
    if not isinstance(cache, HiveCache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}; expected the HiveCache of an earlier call")
    if cache.images is not None and pixel_values is not None:
        raise ValueError("pixel_values given with a cache that has its images; give images in the first call only")
