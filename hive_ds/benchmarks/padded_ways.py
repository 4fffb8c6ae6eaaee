"""What our step is compared with, on the same weights: HIVE as the published code runs it, and SA with padded SDPA.

Axes: B sample, S slot of padded text, P patch of an image, W slot of text and patches together, D model, H query head,
G key/value head, K head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention
from torch.profiler import record_function

from hive_ds.constants import IGNORE_INDEX
from hive_ds.data.batch import PackedBatch
from hive_ds.kernels import finish_keys, to_device
from hive_ds.model.cascaded import CascadedForCausalLM
from hive_ds.model.compiling import compile_encoder
from hive_ds.model.hive import HiveForCausalLM
from hive_ds.model.interleaving import Interleaving
from hive_ds.model.language import decoder, one_sequence_a_row
from hive_ds.model.positions import Grid, build_positions
from hive_ds.model.projector import projector_name
from hive_ds.model.vision import encode_images


@dataclass(frozen=True)
class Shared:
    """What all layers of `PaperWay` read, made once a step.

    Attributes:
        text: cosine and sine of the text, (B * S, K/2) each.
        image: those of the patches, (B * P, K/2) each.
        causal: additive mask (B, 1, S, S) of text alone.
        joint: additive mask (B, 1, S, W) of text and patches in media order.
        text_slots, image_slots: where they stand among the W, (B, S) and (B, P).
    """

    text: tuple[Tensor, Tensor]
    image: tuple[Tensor, Tensor]
    causal: Tensor
    joint: Tensor
    text_slots: Tensor
    image_slots: Tensor


class PaperWay:
    """HIVE on padded batches: keys scattered into one tensor, heads repeated, a dense mask, SDPA, all logits.

    Every sample has one image.
    """

    def __init__(self, hive: HiveForCausalLM) -> None:
        self.hive = hive
        self.layer = _layer

    def compile(self, backend: str = "inductor") -> None:
        """Compile the LLM layer, the projectors in place, and the encoder's blocks.

        Lengths become symbolic when they change. From the start (``dynamic=True``) is an assertion inside torch 2.11.
        """
        self.layer = torch.compile(_layer, backend=backend)
        compile_encoder(self.hive.vision_encoder, backend)
        for projector in self.hive.projectors.values():
            projector.forward = torch.compile(projector.forward, backend=backend)  # type: ignore[method-assign]

    def loss(self, batch: PackedBatch, device: torch.device) -> Tensor:
        """Summed cross-entropy of a batch."""
        ids_BS, labels_BS, lengths = padded(batch)
        with record_function("part:data"):
            ids_BS, labels_BS = (to_device(x, device) for x in (ids_BS, labels_BS))
            pixels = batch.model_inputs(device, self.hive.language_model.dtype)["pixel_values"]
        encoded = encode_images(self.hive.vision_encoder, self.hive.routes.blocks, pixels)
        trunk, routed = decoder(self.hive.language_model), self.hive.routes.blocks_by_layer
        hidden = trunk.embed_tokens(ids_BS)
        offsets = [one[0] for one in batch.image_offsets]
        shared = self._shared(lengths, offsets, ids_BS.shape[1], encoded.grids[0], device, hidden.dtype)
        for index, layer in enumerate(trunk.layers):
            image_BPD = None
            if index in routed:
                (block,) = routed[index]
                projector = self.hive.projectors[projector_name(block, index)]
                with record_function("part:projectors"):
                    image_BPD = projector(encoded.by_block[block]).unflatten(0, (len(lengths), -1))
            with record_function("part:LLM"):
                hidden = self.layer(layer, hidden, image_BPD, shared)
        logits_BSV = self.hive.language_model.lm_head(trunk.norm(hidden)).float()
        with record_function("part:LLM"):
            targets_BS = pad(labels_BS[:, 1:], (0, 1), value=IGNORE_INDEX)  # labels move: logits would be copied
            return cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="sum")

    def _shared(
        self, lengths: list[int], offsets: list[int], slots: int, grid: Grid, device: torch.device, dtype: torch.dtype
    ) -> Shared:
        count, patches = len(lengths), grid[0] * grid[1]
        listed = [[offset] for offset in offsets]
        positions = build_positions([slots] * count, [[grid]] * count, listed, rope=self.hive.config.rope)
        tables = self.hive.frequencies.tables(positions, device)
        at_S, at_P = torch.arange(slots, device=device), torch.arange(patches, device=device)
        first_B1, length_B1 = (to_device(torch.tensor(x)[:, None], device) for x in (offsets, lengths))
        text_slots = torch.where(at_S < first_B1, at_S, at_S + patches)
        image_slots = first_B1 + at_P
        real_BS = at_S < length_B1
        seen_BSS = (at_S[:, None] >= at_S) & real_BS[:, None, :]
        seen_BSW = torch.zeros(count, slots, slots + patches, dtype=torch.bool, device=device)
        seen_BSW.scatter_(2, text_slots[:, None, :].expand_as(seen_BSS), seen_BSS)
        image_seen = (at_S[:, None] >= first_B1[:, :, None]).expand(-1, -1, patches)
        seen_BSW.scatter_(2, image_slots[:, None, :].expand_as(image_seen), image_seen)
        causal, joint = (_additive(seen, dtype) for seen in (seen_BSS, seen_BSW))
        return Shared(
            (tables.cos_TK, tables.sin_TK),
            (tables.image_cos_NK, tables.image_sin_NK),
            causal,
            joint,
            text_slots,
            image_slots,
        )


def padded(batch: PackedBatch) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids and labels as (B, S), padded on the right, and the lengths."""
    lengths = batch.text_lengths
    mask_BS = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids_BS = torch.zeros(mask_BS.shape, dtype=torch.int64)
    labels_BS = torch.full(mask_BS.shape, IGNORE_INDEX)
    ids_BS[mask_BS], labels_BS[mask_BS] = batch.input_ids, batch.labels
    return ids_BS, labels_BS, lengths


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores, rows a multiple of 16 apart: SDPA would copy another one at every call."""
    width = seen.shape[-1]
    blank = torch.zeros(*seen.shape[:-1], width + -width % 16, dtype=dtype, device=seen.device)
    return blank[..., :width].masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _layer(layer: Any, hidden_BSD: Tensor, image_BPD: Tensor | None, shared: Shared) -> Tensor:
    """One decoder layer of a Llama."""
    normed = layer.input_layernorm(hidden_BSD)
    image = None if image_BPD is None else layer.input_layernorm(image_BPD)
    hidden_BSD = hidden_BSD + _attend(layer.self_attn, normed, image, shared)
    return hidden_BSD + layer.mlp(layer.post_attention_layernorm(hidden_BSD))


def _attend(attention: Any, x_BSD: Tensor, image_BPD: Tensor | None, shared: Shared) -> Tensor:
    q, k, v = (_heads(p, x_BSD, attention.head_dim) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    q_weight, k_weight, eps = attention._norm()
    q = _finished(q, q_weight, eps, attention.qk_norm, shared.text)
    k = _finished(k, k_weight, eps, attention.qk_norm, shared.text)
    mask = shared.causal
    if image_BPD is not None:
        own = hasattr(attention, "image_k_proj")
        to_k = attention.image_k_proj if own else attention.k_proj
        to_v = attention.image_v_proj if own else attention.v_proj
        image_k = _heads(to_k, image_BPD, attention.head_dim)
        image_k = _finished(image_k, k_weight, eps, attention.qk_norm, shared.image)
        k, v = _scattered(k, image_k, shared), _scattered(v, _heads(to_v, image_BPD, attention.head_dim), shared)
        mask = shared.joint
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.softmax_scale)
    return attention.o_proj(out.transpose(1, 2).flatten(2))


def _heads(projection: Any, x: Tensor, head_dim: int) -> Tensor:
    return projection(x).unflatten(-1, (-1, head_dim))


def _finished(x: Tensor, weight: Tensor | None, eps: float, qk_norm: str, tables: tuple[Tensor, Tensor]) -> Tensor:
    return finish_keys(x.flatten(0, 1), weight, eps, qk_norm, *tables).view_as(x)


def _scattered(text: Tensor, image: Tensor, shared: Shared) -> Tensor:
    """(B, S, G, K) and (B, P, G, K) in media order, (B, W, G, K)."""
    joint = text.new_zeros(text.shape[0], text.shape[1] + image.shape[1], *text.shape[2:])
    joint = joint.scatter(1, shared.text_slots[:, :, None, None].expand_as(text), text)
    return joint.scatter(1, shared.image_slots[:, :, None, None].expand_as(image), image)


class PaddedCascade:
    """SA: patches and text in one sequence, padded on the right, so that SDPA's causal kernel needs no mask."""

    def __init__(self, model: CascadedForCausalLM) -> None:
        model.language_model.set_attn_implementation("sdpa")
        self.model = model

    def compile(self, backend: str = "inductor") -> None:
        """Compile every encoder block, the projector and every LLM layer in place."""
        compile_encoder(self.model.vision_encoder, backend)
        self.model.projector.forward = torch.compile(self.model.projector.forward, backend=backend)  # type: ignore[method-assign]
        for layer in decoder(self.model.language_model).layers:
            layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)

    def loss(self, batch: PackedBatch, device: torch.device) -> Tensor:
        """Summed cross-entropy of a batch, by the loss that our own model has."""
        with record_function("part:data"):
            inputs = batch.model_inputs(device, self.model.language_model.dtype)
        block = self.model.last_vision_block
        encoded = encode_images(self.model.vision_encoder, (block,), inputs["pixel_values"])
        image = self.model.projector(encoded.by_block[block])
        patches = [[rows * columns] for rows, columns in encoded.grids]
        places = Interleaving.build(batch.text_lengths, patches, batch.image_offsets, keep_last=False)
        trunk = decoder(self.model.language_model)
        mask_BW = torch.arange(max(places.lengths)) < torch.tensor(places.lengths)[:, None]
        rows = mask_BW.flatten().nonzero()[:, 0]
        # Chosen here: on a GPU the host would wait for how many there are.
        counted = (batch.labels != IGNORE_INDEX) & (places.positions_S[places.text_T] > 0)
        before = rows[places.text_T[counted] - 1]
        source, rows, before, targets = (
            to_device(x, device) for x in (places.source_S, rows, before, batch.labels[counted])
        )
        states = torch.cat([trunk.embed_tokens(inputs["input_ids"]), image]).index_select(0, source)
        states_BWD = states.new_zeros(mask_BW.numel(), states.shape[1]).index_copy(0, rows, states)
        with one_sequence_a_row():
            hidden = trunk(inputs_embeds=states_BWD.unflatten(0, mask_BW.shape), use_cache=False).last_hidden_state
        return self.model.language_loss(hidden.flatten(0, 1)[before], targets)
