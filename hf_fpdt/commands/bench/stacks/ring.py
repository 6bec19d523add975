"""Ring attention of transformers and accelerate (context parallelism), as TRL's recipe for long context has it.

`ParallelismConfig(cp_size=...)` with FSDP2, without which accelerate refuses it, transformers' offloaded checkpointing
and TRL's chunked loss. Ranks hold two pieces of the sequence each, one from its beginning and one from its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ParallelismConfig, TorchContextParallelConfig
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ....labels import IGNORE_INDEX, shifted
from ..ranks import accelerator_of, whole
from .base import MANY_GPUS, Pieces, Unavailable, base_of
from .hugging_face import OffloadedHuggingFace
from .trl_loss import CHUNK_TOKENS, chunked_sum


class Ring(OffloadedHuggingFace):
    """`hf-offload` on several GPUs."""

    name = "ring"
    about = "accelerate's ring context parallelism (cp_size, FSDP2), offloaded checkpointing, TRL's chunked loss"
    gpus = (2, MANY_GPUS)

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        """Checkpointing, and the loss inside of the model's forward pass, where FSDP2 has gathered the head."""
        self._check_attention(model)
        super().prepare(model, pieces)
        base = base_of(model)
        base.forward = loss_inside(base, pieces.tokens(CHUNK_TOKENS))

    def _check_attention(self, model: nn.Module) -> None:
        if next(model.parameters()).device.type == "cpu":
            raise Unavailable("torch's ring attention needs kernels of a GPU, and this is a CPU.")

    def spread(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        parallel = ParallelismConfig(cp_size=self.world.size, cp_handler=TorchContextParallelConfig())
        self._accelerator = accelerator_of(Accelerator, model, sharded=True, parallelism_config=parallel)
        try:
            ready: tuple[nn.Module, Any] = self._accelerator.prepare(model, optimizer)
        except ValueError as error:
            raise Unavailable(str(error)) from error
        return ready

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """As Trainer does it: the sum over a rank's labels, over all that count; FSDP2 takes the mean of ranks."""
        missing = -ids_BS.shape[1] % (2 * self.world.size)
        shift_labels = shifted(labels_BS, fill=missing).contiguous()
        kept = (shift_labels != IGNORE_INDEX).sum()
        ids = pad(ids_BS, (0, missing))
        positions = torch.arange(ids.shape[1], device=ids.device)[None].repeat(ids.shape[0], 1)
        # As a collator's. Without it transformers takes a rank's two pieces for packed sequences, by their positions,
        # and makes a mask of a rank's tokens times as many, which accelerate then drops.
        mask = pad(torch.ones_like(ids_BS), (0, missing))
        buffers = [ids, shift_labels, positions, mask]
        with self._accelerator.maybe_context_parallel(
            buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
        ):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            summed = model(**inputs, shift_labels=shift_labels, use_cache=False)
            loss = summed * self.world.size / kept
            self._accelerator.backward(loss)
        return self.world.mean(loss)


def loss_inside(base: Any, chunk_tokens: int) -> Callable[..., Tensor]:
    """A forward pass that gives the summed loss of `shift_labels` in chunks, and no logits.

    Inside of it FSDP2 has gathered the head with the last norm. Of a PEFT model accelerate does not find the norm:
    then the weight is gathered here, once, as TRL does it, and not for every chunk.
    """

    def forward(*, shift_labels: Tensor, **inputs: Any) -> Tensor:
        # PEFT's model around it names all that a model may be given.
        given = {name: value for name, value in inputs.items() if value is not None}
        hidden_BSD, head = base.base_model(**given).last_hidden_state, base.get_output_embeddings()
        logits_of = functools.partial(linear, weight=whole(head.weight), bias=head.bias)
        return chunked_sum(hidden_BSD.flatten(0, 1), logits_of, shift_labels.flatten(), chunk_tokens)

    return forward
