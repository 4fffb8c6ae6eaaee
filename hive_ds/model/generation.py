"""Text generation: Hugging Face's loop over a model whose images are encoded once, before it starts."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from hive_ds.model.cache import HiveCache, check_cache
from hive_ds.model.inputs import PromptImages

if TYPE_CHECKING:
    from hive_ds.model.hive import HiveForCausalLM


CACHE_NAME = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"
"""What Hugging Face's loop calls the cache; transformers 5.24 renamed it."""


NOT_TAKEN = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "prefill_chunk_size")
"""Arguments of Hugging Face's ``generate`` under which it reads prompts in pieces, or steps back."""


class HiveGenerationMixin(GenerationMixin):
    """`generate` for `HiveForCausalLM`."""

    @torch.no_grad()
    def generate(
        self: HiveForCausalLM,
        input_ids: Tensor,
        *,
        image_offsets: Sequence[Sequence[int]] | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        use_cache: bool = True,
        **arguments: Any,
    ) -> Any:
        """Continue prompts: greedy, sampling or beams, as Hugging Face's ``generate``.

        Args:
            input_ids: (B, S) prompts, padded on the left.
            image_offsets, pixel_values, pixel_attention_mask, spatial_shapes: as in `forward`.
            use_cache: keep keys between steps.
            arguments: every other argument of ``transformers.GenerationMixin.generate``; with the cache of an earlier
                call, ``input_ids`` are all tokens so far, and the images are those of that call.

        Raises:
            ValueError: a prompt is empty or padded on the right, images and offsets do not fit each other, pixels
                beside a cache with images, or an argument of `NOT_TAKEN` or ``cache_implementation``.
        """
        config = arguments.get("generation_config") or self.generation_config
        check_arguments(input_ids, arguments, config, not_taken=(*NOT_TAKEN, "cache_implementation"))
        if not input_ids.shape[1]:
            raise ValueError("prompt 0 is empty; expected at least one token")
        attention_mask = arguments.get("attention_mask")
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given = [arguments.pop(name, None) for name in {"past_key_values", CACHE_NAME}]
        cache = next((one for one in given if one is not None), None)
        if cache is not None:
            check_cache(cache, pixel_values)
        images = self.encode_prompt_images(
            pixel_values, image_offsets, len(input_ids), pixel_attention_mask, spatial_shapes
        )
        _warn_unseen_images(mask_BS, images.offsets)
        if use_cache or cache is not None:
            arguments[CACHE_NAME] = HiveCache() if cache is None else cache
        return super().generate(inputs=input_ids, prompt_images=images, use_cache=use_cache, **arguments)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: HiveCache | None = None,
        attention_mask: Tensor | None = None,
        prompt_images: PromptImages | None = None,
        use_cache: bool = True,
        logits_to_keep: int | None = None,
        cache: HiveCache | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """Inputs of one step: with a cache (under either name) only the tokens that it does not hold."""
        past_key_values = past_key_values or cache
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past == 0 and attention_mask is not None:  # the prompts; transformers may have found their padding itself
            _check_padding(attention_mask, len(attention_mask if prompt_images is None else prompt_images.grids))
        # Under ZeRO-3 a finished rank calls the model until all have finished (synced_gpus): any token will do.
        return {
            "input_ids": input_ids[:, min(past, input_ids.shape[1] - 1) :],
            "attention_mask": attention_mask,
            "prompt_images": prompt_images,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep or 0,
        }


def _check_padding(mask_BS: Tensor, prompts: int) -> None:
    """Of rows, as many for each of ``prompts``."""
    wrong = (mask_BS[:, -1] == 0).nonzero()
    if len(wrong):
        prompt = int(wrong[0]) * prompts // len(mask_BS)
        raise ValueError(f"prompt {prompt} ends with padding; prompts to continue must be padded on the left")


def check_arguments(
    input_ids: Tensor,
    arguments: Mapping[str, Any],
    config: GenerationConfig,
    *,
    not_taken: Sequence[str] = NOT_TAKEN,
) -> None:
    """ValueError where there is no prompt, or one of ``not_taken`` is set as an argument, or by a config."""
    if input_ids.dim() != 2 or not len(input_ids):
        raise ValueError(
            f"input_ids is of shape {tuple(input_ids.shape)}; expected (prompts, tokens), 1 prompt or more"
        )
    for name in not_taken:
        value = arguments[name] if name in arguments else getattr(config, name, None)
        if value is not None:
            said = repr(value) if isinstance(value, str | int) else f"a {type(value).__name__}"
            raise ValueError(f"{name} is {said}; expected None: this model does not generate that way")


def _warn_unseen_images(mask_BS: Tensor, image_offsets: Sequence[Sequence[int]]) -> None:
    for row, (offsets, length) in enumerate(zip(image_offsets, mask_BS.sum(dim=1).tolist(), strict=True)):
        if offsets and offsets[-1] >= length:
            warnings.warn(
                f"prompt {row} ends with an image (media offset {offsets[-1]}, {length} tokens): the token that "
                "predicts the first new one cannot see it; put text after the image",
                stacklevel=4,
            )
