"""A cascaded (LLaVA-style) model: features of one vision block, through an MLP, are tokens at the LLM's input.

The same batches and loss as `hive_ds.model.hive`; saved as a folder of transformers' `LlavaForConditionalGeneration`.
Axes: B row, S slot of a padded row, T text token, N image token, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlavaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hive_ds.constants import IGNORE_INDEX
from hive_ds.errors import HiveError
from hive_ds.kernels import to_device
from hive_ds.model.attention_interface import attention_name, bounds_are_given
from hive_ds.model.generation import check_arguments
from hive_ds.model.identity import weights_sha256
from hive_ds.model.inputs import PackedText, PromptImages
from hive_ds.model.interleaving import Interleaving
from hive_ds.model.language_loss import LanguageLoss, sum_of_cross_entropy
from hive_ds.model.projector import MlpProjector
from hive_ds.model.vision import FAMILIES, rest_if_frozen, vision_blocks, vision_class

STOCK_NAMES = {"vision_encoder.": "vision_tower.", "projector.": "multi_modal_projector."}
"""Start of a parameter's name here -> in the folder of a stock Llava; the LLM's are the same."""


def cascaded_config(
    vision_config: Any, text_config: Any, *, feature_block: int, image_token_id: int, vision_sha256: str
) -> LlavaConfig:
    """Config of a cascaded model, a stock Llava's with the hash of the encoder.

    Args:
        vision_config: of the encoder.
        text_config: of the LLM.
        feature_block: block whose features are taken, from 1 or, negative, from the end.
        image_token_id: placeholder in stock transformers; here it never reaches the model.
        vision_sha256: `hive_ds.model.identity.weights_sha256` of the encoder.
    """
    side = getattr(vision_config, "image_size", 0) // vision_config.patch_size
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=feature_block,
        vision_feature_select_strategy="default" if FAMILIES[vision_config.model_type].has_cls else "full",
        image_seq_length=side * side,
        tie_word_embeddings=text_config.tie_word_embeddings,
        vision_sha256=vision_sha256,
        attn_implementation={},  # None, the default, would reset the attention that both have settled on
    )


def processor_values(config: LlavaConfig) -> dict[str, Any]:
    """What ``processor_config.json`` must say for stock transformers to write as many placeholders as patches."""
    strategy = config.vision_feature_select_strategy
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1 if strategy == "default" else 0,
    }


class CascadedForCausalLM(nn.Module):
    """A vision encoder, one projector, and an LLM that reads patches as tokens."""

    def __init__(
        self,
        config: LlavaConfig,
        vision_encoder: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
        *,
        attention_backend: str = "auto",
    ) -> None:
        """Join two models; each is built with random weights from the config unless given.

        Args:
            config: of `cascaded_config`.
            vision_encoder: of one of `hive_ds.model.vision.FAMILIES`.
            language_model: any causal LM of transformers.
            attention_backend: of the LLM, as the recipe's ``model.text_attention_backend``.

        Raises:
            HiveError: the encoder has no such block.
        """
        super().__init__()
        if vision_encoder is None:
            vision_encoder = vision_class(config.vision_config)._from_config(config.vision_config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        language_model.set_attn_implementation(attention_name(attention_backend))
        self.config, self.attention_backend = config, attention_backend
        self.vision_encoder, self.language_model = vision_encoder, language_model
        self.projector = MlpProjector(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_loss = LanguageLoss(language_model)
        self.last_vision_block = block_number(config.vision_feature_layer, len(vision_blocks(vision_encoder)))

    @property
    def feature_blocks(self) -> tuple[int, ...]:
        """The vision block whose features are read."""
        return (self.last_vision_block,)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.projector.linear_1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.projector.linear_1.weight.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> CascadedForCausalLM:
        """As torch's, but rotary frequencies stay in fp32: those of Qwen2 in bf16 turn token 700 by 0.66 radians."""
        exact = {
            (module, name): inv_freq
            for module in self.language_model.modules()
            for name, inv_freq in module.named_buffers(recurse=False)
            if name.endswith("inv_freq")  # in transformers 5 Gemma 3's has one for each kind of layer
        }
        super()._apply(fn, recurse)
        for (module, name), inv_freq in exact.items():
            setattr(module, name, inv_freq.to(getattr(module, name).device))
        return self

    def train(self, mode: bool = True) -> CascadedForCausalLM:
        """As torch's, but a frozen encoder stays in evaluation mode."""
        rest_if_frozen(super().train(mode).vision_encoder)
        return self

    def gradient_checkpointing_enable(self) -> None:
        """Recompute encoder blocks and LLM layers in backward, non-reentrant."""
        for part in (self.vision_encoder, self.language_model):
            part.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        text_lengths: Sequence[int] | None = None,
        image_offsets: Sequence[Sequence[int]] | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Loss or logits of a batch, packed or padded; arguments as in `HiveForCausalLM.forward`.

        An image after a sample's last token, such as the dummy of a batch without images, goes through encoder and
        projector but does not enter the sequence.

        Returns:
            ``loss`` (fp32 scalar) if labels are given, over text tokens, each predicted from the text or image token
            before it. ``logits`` of text tokens: (B, S, V) of a padded batch, (T, V) of a packed one; None with labels.
        """
        if input_ids.dim() == 1:
            text = PackedText.from_packed(input_ids, text_lengths)
        else:
            text = PackedText.from_padded(input_ids, attention_mask)
        places, states_SD = self._read(
            text, image_offsets, pixel_values, pixel_attention_mask, spatial_shapes, keep_last=False
        )
        if labels is None:
            logits = self._logits(places, states_SD, to_device(places.text_T, states_SD.device))
            return CausalLMOutputWithPast(logits=text.padded(logits))
        labels_T = text.packed(labels)  # on the CPU, as loaders leave them: else the host waits for what counts
        text_T, positions_S = (to_device(x, labels_T.device) for x in (places.text_T, places.positions_S))
        # The first token of a sequence has none before it.
        counted = (labels_T != IGNORE_INDEX) & (positions_S[text_T] > 0)
        chosen = (to_device(x, states_SD.device) for x in (text_T[counted] - 1, labels_T[counted]))
        total = self._loss(places, states_SD, *chosen)
        items = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / items)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        image_offsets: Sequence[Sequence[int]] | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """Continue prompts by the LLM's own ``generate``: greedy, sampling or beams, with or without its cache.

        Args:
            input_ids: (B, S) prompts, padded on the left.
            attention_mask, image_offsets, pixel_values, pixel_attention_mask, spatial_shapes: as in `forward`.
            arguments: every other argument of ``transformers.GenerationMixin.generate`` but `NOT_TAKEN` of
                `hive_ds.model.generation`; ``max_length`` and ``min_length`` count what is returned, and no image.

        Returns:
            (B, S + new) tokens, or (B * k, S + new) where k sequences are asked for; with ``return_dict_in_generate``
            they are the ``sequences`` of what transformers returns.
        """
        config = arguments.get("generation_config") or self.language_model.generation_config
        check_arguments(input_ids, arguments, config)
        text = PackedText.from_padded(input_ids, attention_mask)
        places, states_SD = self._read(
            text, image_offsets, pixel_values, pixel_attention_mask, spatial_shapes, keep_last=True
        )
        embeds_BWD, ids_BW, mask_BW = places.left_padded(states_SD, text.input_ids_T, self.config.image_token_index)
        asked = {"max_length", "max_new_tokens"} & arguments.keys() or config.max_new_tokens is not None
        if not asked:  # 4.57 would count images into its default
            is_default = config.max_length == GenerationConfig().max_length
            arguments["max_new_tokens" if is_default else "max_length"] = config.max_length
        if config.min_length:
            arguments.setdefault("min_length", config.min_length)
        for name in {"max_length", "min_length"} & arguments.keys():
            arguments[name] += embeds_BWD.shape[1] - input_ids.shape[1]  # transformers takes off all that it reads
        found = self.language_model.generate(ids_BW, inputs_embeds=embeds_BWD, attention_mask=mask_BW, **arguments)
        new = (found if isinstance(found, Tensor) else found.sequences)[:, ids_BW.shape[1] :]
        whole = torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), dim=0), new], dim=1)
        if isinstance(found, Tensor):
            return whole
        found.sequences = whole
        return found

    def _read(
        self,
        text: PackedText,
        image_offsets: Sequence[Sequence[int]] | None,
        pixel_values: Tensor | None,
        pixel_attention_mask: Tensor | None,
        spatial_shapes: Tensor | None,
        *,
        keep_last: bool,
    ) -> tuple[Interleaving, Tensor]:
        """Where tokens stand, and what the LLM reads there, (tokens of all sequences, D)."""
        images = PromptImages.encode(
            self.vision_encoder,
            self.feature_blocks,
            pixel_values,
            image_offsets,
            len(text.lengths),
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
        )
        projected = [self.projector(features) for features in images.features.values()]  # none without images
        states = self.language_model.get_input_embeddings()(text.input_ids_T)
        # One gather from both: patches that do not enter get a zero gradient, never None.
        states = torch.cat([states, *(patches.to(states.dtype) for patches in projected)])
        lengths = [[rows * columns for rows, columns in grids] for grids in images.grids]
        places = Interleaving.build(text.lengths, lengths, images.offsets, keep_last=keep_last)
        return places, states.index_select(0, to_device(places.source_S, states.device))

    def _loss(self, places: Interleaving, states_SD: Tensor, at: Tensor, targets_T: Tensor) -> Tensor:
        """Cross-entropy, summed, of the tokens that the places ``at`` predict."""
        if not self.language_loss.is_fused(states_SD.device):
            return sum_of_cross_entropy(self._logits(places, states_SD, at), targets_T)
        trunk = self.language_model.get_decoder()
        with bounds_are_given(self.language_model):
            output = trunk(inputs_embeds=states_SD[None], use_cache=False, **places.packed(states_SD.device))
        return self.language_loss(output.last_hidden_state[0, at], targets_T)

    def _logits(self, places: Interleaving, states_SD: Tensor, at: Tensor) -> Tensor:
        """Logits at the places ``at``; the samples stay apart, for positions start again with each."""
        asked = {"logits_to_keep": at, **places.packed(states_SD.device)}
        with bounds_are_given(self.language_model):
            return self.language_model(inputs_embeds=states_SD[None], use_cache=False, **asked).logits[0]

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the folder of a stock `LlavaForConditionalGeneration`.

        Args:
            folder: made if it is not there.
            state_dict: in place of the model's own, which may be partitioned.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = {
            self._stock_name(name): tensor
            for name, tensor in (self.state_dict() if state_dict is None else state_dict).items()
        }
        if self.config.text_config.tie_word_embeddings:
            del named["language_model.lm_head.weight"]  # stock transformers ties it to the embeddings, not them to it
        self.config.architectures = ["LlavaForConditionalGeneration"]
        self.config.vision_sha256 = weights_sha256(named.items())  # another one if it trains
        self.config.save_pretrained(folder)
        if getattr(self.language_model, "generation_config", None) is not None:
            self.language_model.generation_config.save_pretrained(folder)
        save_torch_state_dict(named, folder)

    def _stock_name(self, name: str) -> str:
        """Name of a parameter in a stock folder, which both transformers 4 and 5 read."""
        nested = FAMILIES[self.config.vision_config.model_type].nested_in_v4
        if nested and name.startswith("vision_encoder.") and not name.startswith("vision_encoder.vision_model."):
            name = name.replace("vision_encoder.", "vision_encoder.vision_model.", 1)
        start = next((start for start in STOCK_NAMES if name.startswith(start)), None)
        return name if start is None else STOCK_NAMES[start] + name.removeprefix(start)


def block_number(feature_block: int, num_blocks: int) -> int:
    """Number, from 1, of the block that ``feature_block`` names, which counts from the end where it is negative.

    Raises:
        HiveError: the encoder has no such block.
    """
    number = feature_block if feature_block > 0 else num_blocks + 1 + feature_block
    if not 1 <= number <= num_blocks:
        raise HiveError(
            f"feature_block is {feature_block}, but the encoder has {num_blocks} blocks; expected 1 to {num_blocks}, "
            f"or -1 to -{num_blocks}"
        )
    return number
