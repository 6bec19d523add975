"""DeepSpeed's ALST on several GPUs: Ulysses between ranks, and on each what `alst` has.

Ulysses is DeepSpeed's own (`UlyssesSPAttentionHF`); its engine is not used. Adapters are few, so every rank holds all
weights and gradients of adapters are added up once a step, as `fpdt` has it under DDP. (DDP itself cannot wait for
TiledMLP, which makes gradients of its weights several times a layer.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ....labels import IGNORE_INDEX, shifted
from ..ranks import trains_every_weight
from .alst import DEEPSPEED, Alst
from .base import MANY_GPUS, Pieces, Unavailable, base_of, package


class AlstSp(Alst):
    """Ranks hold one contiguous part of the sequence each, and in attention all of it for their share of heads."""

    name = "alst-sp"
    about = "alst, and DeepSpeed's Ulysses between GPUs; LoRA alone, without DeepSpeed's engine (ZeRO)"
    gpus = (2, MANY_GPUS)

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        """Ulysses takes the place of the registered attention function, in the whole process."""
        if trains_every_weight(model):
            raise Unavailable(
                "alst-sp: every weight needs DeepSpeed's ZeRO, which is not driven here; leave --full out."
            )
        super().prepare(model, pieces)
        base = base_of(model)
        backend = "nccl" if base.device.type == "cuda" else "gloo"
        package("deepspeed.comm", DEEPSPEED).init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        try:
            self._alst.UlyssesSPAttentionHF.register_with_transformers(
                base,
                core_attn_implementation=base.config._attn_implementation,
                sequence_parallel_size=self.world.size,
                micro_batch_size=1,
                seq_length_is_variable=True,
            )
        except ValueError as error:
            raise Unavailable(f"DeepSpeed's Ulysses: {error}") from error

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Own part of ids, positions and shifted labels, as UlyssesSPDataLoaderAdapter cuts them."""
        base, missing = base_of(model), -ids_BS.shape[1] % self.world.size
        targets_BS = shifted(labels_BS, fill=missing)
        positions_BS = torch.arange(targets_BS.shape[1], device=ids_BS.device)[None].expand_as(targets_BS)
        ids, positions, targets = map(self._own_part, (pad(ids_BS, (0, missing)), positions_BS, targets_BS))
        with self._offloading:
            hidden = base.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            kept = (targets_BS != IGNORE_INDEX).sum()
            loss = self._tiled_loss(base.get_output_embeddings(), hidden, targets, kept)
            loss.backward()
        self._add_up(model)
        return self.world.sum(loss)

    def _own_part(self, whole_BS: Tensor) -> Tensor:
        return whole_BS.chunk(self.world.size, dim=1)[self.world.rank].contiguous()

    def _add_up(self, model: nn.Module) -> None:
        """Gradients of all ranks, in one exchange."""
        gradients: list[Any] = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        total = self.world.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
