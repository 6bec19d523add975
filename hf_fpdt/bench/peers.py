"""What people train long sequences with today on one GPU, each switched on as its own documentation says."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..layers import decoder_layers
from .chunked_loss import CHUNK_TOKENS, IGNORED, chunked_nll, summed_loss
from .stack import Pieces, Stack, Unavailable, base_of

# ALST makes fp32 logits of this many bytes at a time.
LOGITS_SLICE = 2**30
DEEPSPEED = "pip install 'deepspeed>=0.19.6' einops"


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
    about = "transformers' offloaded checkpointing (offload=True, 5.17 or later) and TRL's chunked loss"

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        self._loss_tokens = pieces.tokens(CHUNK_TOKENS)
        try:
            # Without a GPU they are in host memory already, and transformers asks for pinned memory that needs one.
            checkpoint_layers(base_of(model), offload=base_of(model).device.type != "cpu")
        except TypeError as error:
            raise Unavailable("this transformers has no offloaded checkpointing; take 5.17 or later.") from error

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        base = base_of(model)
        hidden = base.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state
        loss = chunked_nll(hidden, base.get_output_embeddings(), labels_BS, self._loss_tokens)
        loss.backward()
        return loss.detach()


class Alst(Stack):
    """DeepSpeed's Arctic Long Sequence Training without its Ulysses part, which one GPU has no use for."""

    name = "alst"
    about = "DeepSpeed ALST on one GPU: TiledMLP, tiled loss, checkpoints offloaded beside the computation"

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        """Tiles around every MLP; the context that offloads what checkpointing keeps."""
        self._alst = package("deepspeed.runtime.sequence_parallel.ulysses_sp", DEEPSPEED)
        offload = package("deepspeed.runtime.activation_checkpointing.offload_activations", DEEPSPEED)
        base = base_of(model)
        on_gpu = base.device.type == "cuda"
        self._offloading = offload.get_checkpoint_hidden_states_offloading_ctx_manager(
            use_pin_memory=on_gpu, use_streams=on_gpu
        )
        vocabulary, hidden = base.config.get_text_config().vocab_size, base.config.get_text_config().hidden_size
        self._loss_tokens = pieces.tokens(max(1, LOGITS_SLICE // (4 * vocabulary)))
        for layer in decoder_layers(base):
            self._tile(layer, pieces.tokens(hidden))
        checkpoint_layers(base)

    def _tile(self, layer: Any, tokens: int) -> None:
        """TiledMLP around the layer's MLP; ALST's pieces have as many tokens as the hidden size."""
        mlp = getattr(layer, "mlp", None)
        if mlp is None:
            raise Unavailable(f"TiledMLP needs a layer's `mlp`, and {type(layer).__name__} has none.")
        whole: Callable[[Tensor], Tensor] = mlp.forward
        weights = list(mlp.parameters())

        def tiled(x: Tensor) -> Tensor:
            shards = math.ceil(x.shape[-2] / tokens)
            return self._alst.TiledMLP.apply(lambda _, part: whole(part), mlp, x, shards, weights)

        mlp.forward = tiled

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Both passes inside of the context that offloads."""
        base, targets = base_of(model), labels_BS[:, 1:]
        with self._offloading:
            hidden = base.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state[:, :-1]
            loss = self._tiled_loss(base.get_output_embeddings(), hidden, targets, (targets != IGNORED).sum())
            loss.backward()
        return loss.detach()

    def _tiled_loss(self, head: Any, hidden_BSD: Tensor, targets_BS: Tensor, kept: Tensor) -> Tensor:
        """The sum over targets by TiledFusedLogitsLoss, over the number of those that count."""

        def mean_part(_: Any, hidden: Tensor, labels: Tensor) -> Tensor:
            # Divided in here: the head's gradient is made before anything outside could scale it.
            return summed_loss(head(hidden), labels) / kept

        shards = math.ceil(hidden_BSD.shape[1] / self._loss_tokens)
        weights = list(head.parameters())
        loss: Tensor = self._alst.TiledFusedLogitsLoss.apply(
            mean_part, head, hidden_BSD, targets_BS, None, shards, weights, "sum"
        )
        return loss


def package(name: str, advice: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} cannot be imported ({error}): {advice}.") from error
