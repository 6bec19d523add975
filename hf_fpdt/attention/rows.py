"""Which kernel calls a row of queries is made of: by documents and blocks, and by what the kernel can.

packed kernel, resident keys   one call: every document of the row, the first with its keys before the row
packed kernel, streamed keys   one call for the documents that begin in the row; the one before, span by span
other kernels                  each document by itself
"""

from __future__ import annotations

import math
from typing import Any

from ..layout import Block, Documents, Span, first_key, query_rows, row_cuts, row_spans
from .kernels.contract import MAX_ELEMENTS, Kernel
from .online import KVSource


def row_calls(
    kernel: Kernel,
    row: tuple[int, int],
    unit_tokens: int,
    store: KVSource,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    most_tokens: int = MAX_ELEMENTS,
) -> list[tuple[slice, tuple[Span, ...]]]:
    """The kernel calls for a row of queries: parts of it, each with the spans of keys that its queries read.

    A kernel with packed calls does all documents (or blocks) of the row in one, where the keys of the first of them
    lie side by side with the row's own; else that one alone reads them span by span. Another kernel does each of them
    by itself. No part's keys are over the kernels' 32-bit limit.

    Args:
        row: key positions of the row's first query and one past its last, inside of one chunk.
        unit_tokens: keys a call, where the kernel wants pairs, and of streamed keys.
        window: keys a query sees; then one call has all that the row's queries see, and no other.
        documents: of a packed row.
        most_tokens: keys a call takes at most, without a window.

    Returns:
        Of each part its place among the row's queries, in order, and its spans.

    Raises:
        NotImplementedError: a window is too long for one call.
    """
    start, stop = row
    cuts = row_cuts(start, stop, window, documents)
    parts = list(query_rows(start, stop, window, documents))
    packs = bool(cuts) and kernel.packed_forward is not None and store.kv_shape[0] == 1
    if packs:
        first = first_key(start, window, documents)
        together = first == start or stop <= store.resident_tokens
        fits = stop - first <= min(MAX_ELEMENTS // math.prod(store.kv_shape), most_tokens)
        if together and fits:
            return [(slice(0, stop - start), (Span(first, stop, True, cuts),))]
        parts = [(start, cuts[0]), (cuts[0], stop)]
    limits: dict[str, Any] = {"window": window, "documents": documents, "most_tokens": most_tokens}
    calls = []
    for part in parts:
        inner = cuts[1:] if packs and part[0] > start else ()
        spans = (Span(*part, True, inner),) if inner else kernel_spans(kernel, part, unit_tokens, store, **limits)
        calls.append((slice(part[0] - start, part[1] - start), spans))
    return calls


def kernel_spans(
    kernel: Kernel,
    diagonal: tuple[int, int],
    unit_tokens: int,
    store: KVSource,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    most_tokens: int = MAX_ELEMENTS,
) -> tuple[Span, ...]:
    """The calls for queries [start, stop) of one document, or block, over the keys that they see; as `row_calls`."""
    indexed, first = MAX_ELEMENTS // math.prod(store.kv_shape), first_key(diagonal[0], window, documents)
    if window is None or isinstance(window, Block):
        return row_spans(
            *diagonal,
            shape=kernel.row_shape,
            unit_tokens=unit_tokens,
            max_tokens=min(indexed, most_tokens),
            resident_tokens=store.resident_tokens,
            first=first,
        )
    if diagonal[1] - first > indexed:
        raise NotImplementedError(
            f"hf_fpdt: a window of {window:,} keys and a chunk of {diagonal[1] - diagonal[0]:,} are more than the "
            f"{indexed:,} keys that kernels index in one call; use shorter chunks (chunk_tokens)."
        )
    return (Span(first, diagonal[1], True),)
