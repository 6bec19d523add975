"""Recurrent layers over packed rows: scans and convolutions that start afresh at each document of a chunk.

A layer runs once on a chunk, whatever documents are in it: its products act on each token alone. What goes from token
to token is stopped where a document begins:

    states        what the chunk before left is for the document that goes on, and for no other
    convolutions  the first K - 1 tokens of each document are convolved once more, by themselves
    scans         one call with marks where the kernel takes them (`cu_seqlens`, `seq_idx`), else a call a document
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout import Documents
from .scans import STATES, heads_of_scan

# What kernels call marks of documents, in the order in which they are asked for: mamba-ssm knows both names, and the
# second one is for requests that are decoded.
SCAN_MARKS = ("seq_idx", "cu_seqlens")


@dataclass(frozen=True)
class ChunkDocuments:
    """The documents of one chunk of a packed row.

    Attributes:
        documents: of the row.
        chunk: the chunk's tokens.
        own: those of them that this rank has.
    """

    documents: Documents
    chunk: range
    own: range

    @property
    def goes_on(self) -> bool:
        """Whether the chunk's first document began before it; then it has states."""
        return self.documents.start_of(self.chunk.start) < self.chunk.start

    @property
    def edges(self) -> tuple[int, ...]:
        """Where documents begin in the chunk, counted from its first token, and its length."""
        inner = self.documents.inside(self.chunk.start, self.chunk.stop)
        return (0, *(start - self.chunk.start for start in inner), len(self.chunk))

    @property
    def own_edges(self) -> tuple[int, ...]:
        """The same of this rank's tokens."""
        inner = self.documents.inside(self.own.start, self.own.stop)
        return (0, *(start - self.own.start for start in inner), len(self.own))

    def before_own(self, device: torch.device) -> Tensor:
        """What each of the rank's tokens adds to its place among them to get its place in its document, [S]."""
        starts = [self.documents.start_of(self.own.start), *(self.own.start + edge for edge in self.own_edges[1:-1])]
        lengths = torch.tensor(self.own_edges).diff()
        return (self.own.start - torch.tensor(starts)).repeat_interleave(lengths).to(device)

    def without_others(self, inputs_BCK: Tensor, *, before_own: bool) -> Tensor:
        """The last K inputs of a convolution before the rank's own tokens, or before the chunk's end: zeros for
        those that are not of the document of the rank's first token, or of the chunk's last one."""
        at, token = (self.own.start,) * 2 if before_own else (self.chunk.stop, self.chunk.stop - 1)
        kernel = inputs_BCK.shape[-1]
        others = kernel - min(kernel, at - self.documents.start_of(token))
        if not others:
            return inputs_BCK
        return torch.cat([torch.zeros_like(inputs_BCK[..., :others]), inputs_BCK[..., others:]], dim=-1)


def kernel_behind(function: Callable[..., Any]) -> Any:
    """What transformers chose for a function of recurrent layers: a package's, or its own in PyTorch."""
    return inspect.getclosurevars(function).nonlocals.get("implementation")


@functools.lru_cache(maxsize=256)
def scan_marks(scan: Callable[..., Any]) -> str | None:
    """What the kernel behind a scan calls marks of documents; None where it takes none.

    Transformers' door before it takes any argument, and drops or refuses what the kernel does not know.
    """
    kernel = kernel_behind(scan)
    names = inspect.signature(scan if kernel is None else kernel).parameters
    return next((name for name in SCAN_MARKS if name in names), None)


def scan_of_documents(scan: Callable[..., Any], part: ChunkDocuments, *, marked: bool) -> Callable[..., Any]:
    """A scan of a whole chunk that starts afresh at each of its documents.

    Args:
        scan: of inputs [1, S, heads, ...]; it may be given the state of the document that goes on.
        part: the chunk's documents.
        marked: whether marks of documents are given to it, if it takes them.

    Returns:
        As the scan: outputs, and the last document's state.
    """
    edges, marks = part.edges, scan_marks(scan) if marked else None
    if len(edges) == 2:
        return scan

    def in_one_call(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        assert marks is not None
        given, of_each = {**kwargs, marks: _marks(marks, edges, device)}, marks == "cu_seqlens"
        for name in STATES if of_each else ():
            if (state := kwargs.get(name)) is not None:
                given[name] = torch.cat([state, state.new_zeros(len(edges) - 2, *state.shape[1:])])
        result = scan(*args, **given)
        if not of_each or not isinstance(result, tuple):
            return result
        output, *states = result
        return (output, *(None if state is None else state[-1:] for state in states))

    def one_by_one(*args: Any, **kwargs: Any) -> Any:
        given = dict(enumerate(args)) | kwargs
        by_token, outputs, rest = heads_of_scan(given), list[Tensor](), tuple[Any, ...]()
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            piece = {name: value[:, start:stop] if name in by_token else value for name, value in given.items()}
            if start:
                piece |= {name: None for name in STATES if name in piece}
            result = scan(*(piece[place] for place in range(len(args))), **{name: piece[name] for name in kwargs})
            output, *rest_of_it = result if isinstance(result, tuple) else (result,)
            outputs.append(output)
            rest = tuple(rest_of_it)
        whole = torch.cat(outputs, dim=1)
        return (whole, *rest) if rest else whole

    return one_by_one if marks is None else in_one_call


def convolution_of_documents(convolve: Callable[..., Tensor], part: ChunkDocuments) -> Callable[..., Tensor]:
    """A causal convolution of a rank's tokens that sees no inputs of another document.

    Args:
        convolve: of inputs [1, C, T], of which the rank's tokens are the last, and weights [C, K].
        part: the chunk's documents; inputs before the rank's tokens are those of its first document already.
    """
    edges = part.own_edges
    if len(edges) == 2:
        return convolve

    def by_document(x_1CT: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        whole, early = convolve(x_1CT, weight, *args, **kwargs), weight.shape[-1] - 1
        if not early:
            return whole
        tokens, real, places = _first_tokens(edges, early, x_1CT.device)
        left = x_1CT.shape[-1] - edges[-1]
        firsts = x_1CT[0][:, tokens + left].transpose(0, 1).contiguous()  # [documents, C, K - 1]
        again = convolve(firsts, weight, *args, **kwargs).transpose(0, 1).flatten(1)
        return whole.index_copy(2, places + left, again[None].index_select(2, real))

    return by_document


@functools.lru_cache(maxsize=64)
def _marks(name: str, edges: tuple[int, ...], device: torch.device) -> Tensor:
    """As flash-linear-attention wants them, [documents + 1], or as mamba-ssm does: a number for each token, [1, S].

    A tensor is made once for all layers: kernels look at its numbers on the host, and know it again.
    """
    with torch.inference_mode(False):
        cuts = torch.tensor(edges, dtype=torch.int32)
        if name == "seq_idx":
            numbers = torch.arange(len(edges) - 1, dtype=torch.int32)
            return numbers.repeat_interleave(cuts.diff())[None].to(device)
        return cuts.to(device)


@functools.lru_cache(maxsize=64)
def _first_tokens(edges: tuple[int, ...], n_tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The first tokens of each document but the first, [documents - 1, n]; which of these it has, and where they are.

    Short documents lack some: in their place are whatever tokens come next, which are not looked at.
    """
    with torch.inference_mode(False):
        cuts = torch.tensor(edges)
        tokens = cuts[1:-1, None] + torch.arange(n_tokens)
        real = (tokens < cuts[2:, None]).view(-1).nonzero().view(-1)
        found = tokens.clamp(max=edges[-1] - 1), real, tokens.view(-1)[real]
    return found[0].to(device), found[1].to(device), found[2].to(device)
