"""Where tensors live between their uses: the K, V store of one layer and the checkpoint store of all layers.

Both keep everything on the device in this version. Whoever uses them asks by chunk or by span of keys and never learns
where the bytes were; that contract is the room's door.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .layout import Chunk, ChunkPlan, Span


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype in which gradients of `dtype` add up over chunks: fp32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class KVStore:
    """K and V of one layer by chunk, and their gradients, [B, T, G, H] with T the sequence's global tokens.

    Raises:
        RuntimeError: a method is called out of order (read before put, a gradient taken twice, …).
    """

    def __init__(self, plan: ChunkPlan) -> None:
        self.plan = plan
        self._kv: tuple[Tensor, Tensor] | None = None
        self._grads: tuple[Tensor, Tensor] | None = None
        self._held: set[int] = set()

    @classmethod
    def holding(cls, k_BTGH: Tensor, v_BTGH: Tensor) -> KVStore:
        """A store of one chunk around tensors that are already whole; nothing is copied."""
        store = cls(ChunkPlan(k_BTGH.shape[1], k_BTGH.shape[1]))
        store._kv, store._held = (k_BTGH, v_BTGH), {0}
        return store

    def put(self, chunk: Chunk, k_BSGH: Tensor, v_BSGH: Tensor) -> None:
        """Keep K and V of one chunk (copied)."""
        if self._kv is None:
            self._kv = (self._whole(k_BSGH), self._whole(v_BSGH))
        for whole, part in zip(self._kv, (k_BSGH, v_BSGH), strict=True):
            whole[:, chunk.start : chunk.stop].copy_(part)
        self._held.add(chunk.index)

    def _whole(self, part_BSGH: Tensor) -> Tensor:
        batch, _, *heads = part_BSGH.shape
        return part_BSGH.new_empty(batch, self.plan.n_tokens, *heads)

    def stream(self, spans: Iterable[Span]) -> Iterator[tuple[Span, Tensor, Tensor]]:
        """(span, K, V) on the device for each span, in order; the tensors are views, not to be written."""
        for span in spans:
            if self._kv is None or not self._covers(span):
                raise RuntimeError(f"KVStore.stream: keys [{span.start}, {span.stop}) were not put yet.")
            k, v = (whole[:, span.start : span.stop] for whole in self._kv)
            yield span, k, v

    def holds(self, chunk: Chunk) -> bool:
        """Whether K and V of the chunk were put."""
        return chunk.index in self._held

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Batch, heads and head dimension of K and V."""
        if self._kv is None:
            raise RuntimeError("KVStore.kv_shape: nothing was put yet.")
        batch, _, heads, head_dim = self._kv[0].shape
        return batch, heads, head_dim

    def _covers(self, span: Span) -> bool:
        size = self.plan.chunk_tokens
        return self._held.issuperset(range(span.start // size, -(-span.stop // size)))

    def add_grad(self, span: Span, dk_BSGH: Tensor, dv_BSGH: Tensor) -> None:
        """Add one call's gradients to those of its keys; the sums are fp32 (float64 for float64)."""
        whole_call = span.start == 0 and span.stop == self.plan.n_tokens
        if self._grads is None and whole_call:
            # The first row sees every key: its gradients ARE the sums so far. A plan of one row needs no cast at all.
            one_row = len(self.plan.chunks) == 1
            self._grads = (dk_BSGH, dv_BSGH) if one_row else (_accumulator(dk_BSGH), _accumulator(dv_BSGH))
            return
        if self._grads is None:
            assert self._kv is not None
            self._grads = (_zeros_for(self._kv[0]), _zeros_for(self._kv[1]))
        for total, part in zip(self._grads, (dk_BSGH, dv_BSGH), strict=True):
            total[:, span.start : span.stop].add_(part)

    def take_grad(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """dK, dV of a chunk in the dtype of K, once every row that reads it was added."""
        if self._kv is None or self._grads is None or chunk.index not in self._held:
            raise RuntimeError(f"KVStore.take_grad: chunk {chunk.index} has no gradient, or it was taken before.")
        self._held.remove(chunk.index)
        dk, dv = (total[:, chunk.start : chunk.stop].to(self._kv[0].dtype) for total in self._grads)
        return dk, dv


def _accumulator(grad: Tensor) -> Tensor:
    return grad.to(accumulation_dtype(grad.dtype))


def _zeros_for(whole: Tensor) -> Tensor:
    return torch.zeros(whole.shape, dtype=accumulation_dtype(whole.dtype), device=whole.device)


class LayerCheckpoint:
    """What one layer's backward pass needs of its forward pass, by name and chunk; each entry is taken once."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int], tuple[Tensor, int]] = {}

    def put(self, name: str, chunk: Chunk, value: Tensor) -> None:
        """Keep `value` under (name, chunk)."""
        self._entries[name, chunk.index] = value, value._version

    def holds(self, name: str, chunk: Chunk) -> bool:
        """Whether `take` would find (name, chunk)."""
        return (name, chunk.index) in self._entries

    def take(self, name: str, chunk: Chunk) -> Tensor:
        """Hand (name, chunk) over and forget it; raises as `peek`."""
        value = self.peek(name, chunk)
        del self._entries[name, chunk.index]
        return value

    def peek(self, name: str, chunk: Chunk) -> Tensor:
        """(name, chunk), which stays in the record.

        Raises:
            RuntimeError: it was taken before, as by a second backward pass through the same graph, or somebody wrote
                to it since it was put.
        """
        if not self.holds(name, chunk):
            raise RuntimeError(
                f"The checkpoint {name!r} of chunk {chunk.index} was used before: FPDT frees what a layer kept as its "
                "backward pass goes, so one forward pass serves one backward pass. Run the forward pass again."
            )
        value, version = self._entries[name, chunk.index]
        if value._version != version:
            raise RuntimeError(
                f"The checkpoint {name!r} of chunk {chunk.index} was changed in place after the forward pass; its "
                "gradient would be wrong. Change a copy instead."
            )
        return value


class CheckpointStore:
    """Checkpoints of all layers of one model; a layer's are freed when its autograd graph is."""

    def new_layer(self) -> LayerCheckpoint:
        """An empty record for one call of one layer."""
        return LayerCheckpoint()
