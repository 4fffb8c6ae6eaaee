"""HiveForCausalLM: text tokens of routed LLM layers attend to features of several vision blocks.

Source: arXiv 2604.00086. Axes: B row, S slot of a padded row, T text token, N image token, D model, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hive_ds.errors import HiveError
from hive_ds.model.attention import AttentionCall, HiveAttention
from hive_ds.model.cache import HiveCache, check_cache
from hive_ds.model.configuration import HiveConfig, config_to_load
from hive_ds.model.generation import CACHE_NAME, HiveGenerationMixin
from hive_ds.model.inputs import AttentionContext, BatchContext, PackedText, PromptImages
from hive_ds.model.language import ask_no_gradient_of_inputs, check_language_model, check_texts, decoder
from hive_ds.model.language_loss import LanguageLoss
from hive_ds.model.last_layer import narrow_on_request
from hive_ds.model.positions import RotaryFrequencies
from hive_ds.model.projector import Projector, projector_name
from hive_ds.model.routes import Routes
from hive_ds.model.runs import image_states, run_layers, split_runs
from hive_ds.model.vision import rest_if_frozen, tower_key_mapping, vision_blocks, vision_class


class HiveForCausalLM(HiveGenerationMixin, PreTrainedModel):
    """A vision encoder, projectors, and an LLM that attends to the encoder's blocks at its routed layers."""

    config_class = HiveConfig
    base_model_prefix = "hive"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: HiveConfig,
        vision_encoder: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        """Join two models; each is built with random weights from the config unless given.

        Raises:
            HiveError: the routes do not fit the models, or the LLM cannot take routes.
        """
        super().__init__(config)
        if vision_encoder is None:
            vision_encoder = vision_class(config.vision_config)._from_config(config.vision_config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        check_language_model(language_model)
        self.vision_encoder, self.language_model = vision_encoder, language_model
        layers = decoder(language_model).layers
        self.routes = Routes.build(
            config.vision_blocks,
            config.language_layers,
            num_blocks=len(vision_blocks(vision_encoder)),
            num_layers=len(layers),
        )
        for index, layer in enumerate(layers):
            layer.self_attn = self._build_attention(layer.self_attn, index)
        narrow_on_request(layers[-1])
        self.runs = split_runs(len(layers), range(len(layers)))  # layer by layer, until they are compiled
        self.run_layers, self.image_states = run_layers, image_states
        sizes = (config.vision_config.hidden_size, config.text_config.hidden_size)
        self.projectors = nn.ModuleDict({projector_name(*pair): Projector(*sizes) for pair in self.routes.pairs})
        self.language_loss = LanguageLoss(language_model)
        self._frequencies: RotaryFrequencies | None = None
        if getattr(language_model, "generation_config", None) is not None:
            self.generation_config = language_model.generation_config
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **keywords: Any) -> Any:
        """As transformers' own; folders saved under transformers 4 and 5 both load."""
        config = config_to_load(pretrained_model_name_or_path, keywords)
        keywords.setdefault("key_mapping", tower_key_mapping(config.vision_config))
        return super().from_pretrained(pretrained_model_name_or_path, *arguments, **keywords)

    def _build_attention(self, attention: nn.Module, index: int) -> HiveAttention:
        routed = index in self.routes.blocks_by_layer
        return HiveAttention(
            attention,
            index,
            routed=routed,
            image_kv=self.config.image_kv,
            qk_norm=self.config.qk_norm,
            eps=self.config.text_config.rms_norm_eps,
            backend=self.config.attention_backend if routed else self.config.text_attention_backend,
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights of our own modules; the encoder's and the LLM's are theirs to set."""
        if isinstance(module, Projector):
            module.reset_parameters()

    @property
    def last_vision_block(self) -> int:
        """The deepest routed vision block; the encoder stops after it."""
        return self.routes.last_block

    @property
    def feature_blocks(self) -> tuple[int, ...]:
        """The vision blocks whose features are read."""
        return self.routes.blocks

    @property
    def frequencies(self) -> RotaryFrequencies:
        """The LLM's rotary frequencies in fp32."""
        if self._frequencies is None:
            self._frequencies = RotaryFrequencies(decoder(self.language_model).rotary_emb)
        return self._frequencies

    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters that `forward` reads without calling the layer that holds them (ZeRO-3 must know)."""
        layers = decoder(self.language_model).layers
        return [layers[index].input_layernorm.weight for index in self.routes.blocks_by_layer]

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's head."""
        self.language_model.set_output_embeddings(value)

    def train(self, mode: bool = True) -> HiveForCausalLM:
        """As torch's, but a frozen encoder stays in evaluation mode."""
        rest_if_frozen(super().train(mode).vision_encoder)
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute encoder blocks and LLM layers in backward, non-reentrant.

        Raises:
            HiveError: ``use_reentrant=True``, under which vision features get no gradient.
        """
        arguments = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if arguments["use_reentrant"]:
            raise HiveError(
                "gradient checkpointing: use_reentrant=True loses the gradient of vision features; use False"
            )
        super().gradient_checkpointing_enable(arguments)
        ask_no_gradient_of_inputs(self)

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
        prompt_images: PromptImages | None = None,
        num_items_in_batch: int | Tensor | None = None,
        past_key_values: HiveCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Loss or logits of a batch, packed or padded.

        Args:
            input_ids: (T,) tokens end to end, or (B, S) padded.
            attention_mask: (B, S) 1 on tokens, padded batches only; with a cache (B, past + S), 0 also behind answers.
            labels: shaped as ``input_ids``, each position's own token: the shift happens here. Fastest on the CPU.
            text_lengths: tokens of each sample of a packed batch.
            image_offsets: media offset of each image of each row, ascending: text tokens before it, padding and
                placeholders not counted.
            pixel_values: (I, 3, height, width) images, row by row, in the order of ``image_offsets``.
            pixel_attention_mask: (I, P), variable-resolution SigLIP2 only.
            spatial_shapes: (I, 2), variable-resolution SigLIP2 only.
            prompt_images: images already encoded, in place of the four arguments above.
            num_items_in_batch: supervised tokens that the summed loss is divided by; default those of this batch.
            past_key_values: cache of earlier calls; images are given in the first call only.
            use_cache: keep keys and return a cache.
            logits_to_keep: logits of the last so many slots only (padded batches); 0 means all.
            return_dict: must be True; here because Hugging Face's pipelines pass it.

        Returns:
            ``loss`` (fp32 scalar) if labels are given. ``logits``: (B, S, V) of a padded batch, (T, V) of a packed
            one; None for a packed batch with labels, whose logits are made at supervised positions only.

        Raises:
            ValueError: lengths, offsets or pixels that do not fit each other, or pixels beside a cache with images.
            HiveError: images that do not fit the encoder, or a text longer than the LLM's sliding window.
        """
        if input_ids.dim() == 1:
            text = PackedText.from_packed(input_ids, text_lengths)
        else:
            text = PackedText.from_padded(input_ids, attention_mask)
        if use_cache and past_key_values is None:
            past_key_values = HiveCache()
        if past_key_values is not None:
            check_cache(past_key_values, pixel_values)
            past_key_values.forget_padding(attention_mask, new=input_ids.shape[-1])
        first_call = past_key_values is None or past_key_values.images is None
        if first_call and prompt_images is None:
            prompt_images = self.encode_prompt_images(
                pixel_values, image_offsets, len(text.lengths), pixel_attention_mask, spatial_shapes
            )
        images = prompt_images if first_call else None
        loss = logits = None
        if labels is None or text.mask_BS is not None:
            hidden_TD = self._decode(text, images, past_key_values)
            logits = self._logits(hidden_TD, text, logits_to_keep)
        if labels is not None:
            rows_R, targets_R = text.supervised(labels)
            packed = text.mask_BS is None
            hidden_RD = self._decode(text, images, past_key_values, rows_R) if packed else hidden_TD[rows_R]
            items = max(len(rows_R), 1) if num_items_in_batch is None else num_items_in_batch  # 0 / 1 if none is
            loss = self.language_loss(hidden_RD, targets_R) / items
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: past_key_values})

    def encode_prompt_images(
        self,
        pixel_values: Tensor | None,
        image_offsets: Sequence[Sequence[int]] | None,
        prompts: int,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> PromptImages:
        """Run the encoder over the images of ``prompts`` prompts; arguments as in `forward`."""
        return PromptImages.encode(
            self.vision_encoder,
            self.routes.blocks,
            pixel_values,
            image_offsets,
            prompts,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
        )

    def _decode(
        self, text: PackedText, new_images: PromptImages | None, cache: HiveCache | None, rows_R: Tensor | None = None
    ) -> Tensor:
        """Final hidden states of the new tokens, (T, D) or (R, D); ``new_images`` are those of a first call."""
        trunk = decoder(self.language_model)
        images, batch = self._context(text, new_images, cache)
        routed = {} if images.is_empty else self.routes.blocks_by_layer
        hidden = trunk.embed_tokens(text.input_ids_T[None])
        shared: dict[tuple[int, str], dict[str, Any]] = {}  # by kind of layer: its number of routes, and its backend
        for run in self.runs:
            calls = []
            for index in run:
                blocks, attention = routed.get(index, ()), trunk.layers[index].self_attn
                context, kind = batch.by_blocks[len(blocks)], (len(blocks), attention.backend)
                if cache is None and kind not in shared:
                    shared[kind] = attention.shared_fields(context.layout, hidden.dtype)
                fields = shared.get(kind, {}) | {"rows_R": rows_R if index == len(trunk.layers) - 1 else None}
                if blocks and new_images:
                    fields["image_ND"] = self._image_states(index, blocks, images, context)
                    fields |= {"image_cos_NK": context.image_cos_NK, "image_sin_NK": context.image_sin_NK}
                calls.append(AttentionCall(context.layout, batch.cos_TK, batch.sin_TK, cache=cache, **fields))
            # A step with a cache is another shape every time, so it is not compiled.
            with contextlib.nullcontext() if cache is None else torch.compiler.set_stance("force_eager"):
                hidden = self.run_layers([trunk.layers[index] for index in run], hidden, calls)
        return trunk.norm(hidden).squeeze(0)

    def _context(
        self, text: PackedText, new_images: PromptImages | None, cache: HiveCache | None
    ) -> tuple[PromptImages, BatchContext]:
        """The prompts' images, and what all layers share; a cache makes room for the new tokens."""
        images, lengths, query_lengths = new_images, text.lengths, None
        if cache is not None:
            images = cache.images = new_images or cache.images
            cache.start(text.lengths, text.mask_BS.shape[1] if text.mask_BS is not None else 0, text.input_ids_T.device)
            lengths, query_lengths = cache.lengths, text.lengths
        assert images is not None
        check_texts(self.config.text_config, lengths)
        routed = () if images.is_empty else self.routes.blocks_by_layer.values()
        return images, BatchContext.build(
            images,
            images.prompt_of_row(len(lengths)),
            lengths,
            block_counts={len(blocks) for blocks in routed},
            frequencies=self.frequencies,
            rope=self.config.rope,
            query_lengths=query_lengths,
            images_cached=new_images is None,
            device=text.input_ids_T.device,
        )

    def _image_states(
        self, index: int, blocks: tuple[int, ...], images: PromptImages, context: AttentionContext
    ) -> Tensor:
        projectors = [self.projectors[projector_name(block, index)] for block in blocks]
        norm = decoder(self.language_model).layers[index].input_layernorm
        return self.image_states(projectors, norm, [images.features[block] for block in blocks], context.interleave)

    def _logits(self, hidden_TD: Tensor, text: PackedText, keep: int) -> Tensor:
        if text.mask_BS is None or keep == 0:
            return text.padded(self.language_model.lm_head(hidden_TD))
        last = torch.zeros_like(text.mask_BS)
        last[:, -keep:] = True
        kept = PackedText(text.input_ids_T, text.lengths, (text.mask_BS & last)[:, -keep:])
        return kept.padded(self.language_model.lm_head(hidden_TD[last[text.mask_BS]]))


AutoConfig.register("hive", HiveConfig)
AutoModelForCausalLM.register(HiveConfig, HiveForCausalLM)
