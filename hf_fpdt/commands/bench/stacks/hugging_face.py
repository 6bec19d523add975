"""What a user of transformers has: plain checkpointing, Liger's kernels, offloaded checkpointing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import Pieces, Stack, Unavailable, base_of, package
from .trl_loss import CHUNK_TOKENS, chunked_nll

# ALST makes fp32 logits of this many bytes at a time.
LOGITS_SLICE = 2**30


class HuggingFace(Stack):
    """SDPA attention, every layer checkpointed."""

    name = "hf"
    about = "transformers with SDPA and gradient checkpointing"

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        checkpoint_layers(base_of(model))


def checkpoint_layers(model: Any, **how: Any) -> None:
    """Gradient checkpointing under the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(**how)


class Liger(HuggingFace):
    """Liger's fused kernels on top, the fused linear cross-entropy among them."""

    name = "liger"
    about = "hf, and Liger kernels: RoPE, norms, SwiGLU, fused linear cross-entropy"

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        """Liger's own patch of an instance, then checkpointing."""
        liger = package("liger_kernel.transformers.monkey_patch", "pip install liger-kernel (it needs Triton)")
        base = base_of(model)
        kind = base.config.model_type
        if kind not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise Unavailable(f"liger-kernel has no kernels for a {kind} model.")
        if base.device.type == "cpu":
            raise Unavailable("Liger's kernels are Triton's, which run on a GPU and not on the CPU.")
        liger._apply_liger_kernel_to_instance(model=base)
        super().prepare(model, pieces)


class OffloadedHuggingFace(Stack):
    """What transformers and TRL do for long context: checkpoints in host memory, loss in chunks."""

    name = "hf-offload"
    about = "transformers' offloaded checkpointing (offload=True) and TRL's chunked loss"

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        self._loss_tokens = pieces.tokens(CHUNK_TOKENS)
        # Without a GPU they are in host memory already, and transformers asks for pinned memory that needs one.
        checkpoint_layers(base_of(model), offload=base_of(model).device.type != "cpu")

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        base = base_of(model)
        hidden = base.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state
        loss = chunked_nll(hidden, base.get_output_embeddings(), labels_BS, self._loss_tokens)
        loss.backward()
        return loss.detach()
