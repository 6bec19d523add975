"""DeepSpeed's ALST on one GPU: tiled MLP and loss, checkpoints on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ....labels import IGNORE_INDEX
from ....model import decoder_layers
from .base import Pieces, Stack, Unavailable, base_of, package
from .hugging_face import LOGITS_SLICE, checkpoint_layers
from .trl_loss import summed_loss

DEEPSPEED = "pip install 'deepspeed>=0.19.6' einops"


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
            loss = self._tiled_loss(base.get_output_embeddings(), hidden, targets, (targets != IGNORE_INDEX).sum())
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
