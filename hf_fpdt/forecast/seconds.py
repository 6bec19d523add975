"""Seconds of a training step, and of what GPUs send each other in it. Numbers only; no torch.

A step is attention at the kernel's rate, matrix products at theirs, and everything else (norms, activations, adapters,
copies inside the device) at the speed of device memory.

An all-to-all of Ulysses (`parallel.group`; paper sections 2 and 4.1) stands in the way: the stream that computes waits
for it, and what comes next reads what it brought. Its time counts in full, and so does that of the copies around it
that bring heads into order. Only copies to and from the host go on meanwhile.

FSDP2 gathers weights one layer ahead and reduces gradients of the layer before, on streams of its own: that is beside
computation, and a step waits for it only where it takes longer. It fetches ahead for backward passes alone, so what is
gathered once more to rebuild an input is counted as in the way.
"""

from __future__ import annotations

from collections import Counter

from ..layout import seen_pairs
from ..plan import KeptLayers, LayerMix, ModelSizes, StepSizes, saved_operations, spared_operations
from .collectives import Collectives, ShardedWeights, StepCollectives
from .rates import GPU

# GPUs that NVLink joins; more of them are on several hosts, each GPU with a network card of its own.
GPUS_A_HOST = 8
# Passes over device memory for the copies around exchanges, each of which reads and writes: dq, dk, dv, which go back
# to pieces together, are copied twice (N + 2 G of 6 N + 6 G heads: a fifth), all else once.
COPY_PASSES = 2
ORDER_PASSES = 1.2 * COPY_PASSES


def ulysses(step: StepSizes, kept: KeptLayers) -> Collectives:
    """The exchanges of a step, and the bytes that one rank sends to others in them.

    In each layer, for each token of its own, a rank exchanges tensors of N query and G key/value heads (repeated until
    the ranks divide them) with H elements a head:

        forward    q, k, v, out                                        2 N + 2 G
        backward   k, v again; q, out of the replay; dout, dq, dk, dv  4 N + 4 G
        rebuild    forward again, 2 N + 2 G; out alone, N, where attention's output was kept

    and one part in `sp_size` stays; v and out, and their gradients, are as wide as values. Layers with a window send
    as much as others. That attention's output was kept saves none in the replay: it is kept for a rank's heads, and
    backward needs it for the rank's tokens, and q for its heads.

    Args:
        step: of a model that trains in every layer's attention.
        kept: what the step keeps.
    """
    m, plan = step.model, step.plan
    return StepCollectives(
        n_tokens=plan.n_tokens,
        chunk_tokens=plan.chunk_tokens,
        sp_size=plan.sp_size,
        layers=m.layers,
        q_heads=m.q_heads,
        kv_heads=m.kv_heads,
        head_dim=m.head_dim,
        value_dim=m.value_dim,
        batch=step.batch,
        element_bytes=step.attention_bytes,
        backward_layers=kept.layers,
        rebuilt_layers=kept.rebuilt,
        rebuilt_attentions=kept.rebuilt_attentions,
    ).step()


def ulysses_seconds(step: StepSizes, kept: KeptLayers, gpu: GPU) -> float:
    """Seconds of a step in which nothing is computed, as GPUs exchange heads for pieces of the sequence.

    A rank sends as much to each of the others; those of its host and the rest at the same time.
    """
    ranks, mixes = step.plan.sp_size, step.model.all_mixes
    if ranks == 1:
        return 0.0
    attending = sum(mix.attends for mix in mixes) / len(mixes)
    sent = attending * ulysses(step, kept).sent_bytes + sum(_scan_exchange_bytes(step, mix) for mix in mixes)
    inside = min(ranks, GPUS_A_HOST) - 1
    outside = ranks - 1 - inside
    on_the_way = sent / (ranks - 1) * max(inside / gpu.peers, outside / gpu.network)
    return on_the_way + ORDER_PASSES * sent * ranks / (ranks - 1) / gpu.memory


# Channels of the convolution's output go into a scan, and about half as many come out of it.
SCAN_EXCHANGED = 1.5


def _scan_exchange_bytes(step: StepSizes, mix: LayerMix) -> float:
    """What a rank sends around one layer's scan: forward, in the replay, and gradients."""
    ranks, channels = step.plan.sp_size, mix.channels if mix.scanned else 0
    tokens = step.batch * step.plan.n_tokens / ranks
    return 3 * SCAN_EXCHANGED * tokens * channels * step.attention_bytes * (ranks - 1) / ranks


def sharded_seconds(weights: ShardedWeights, kept: KeptLayers, gpu: GPU) -> tuple[float, float]:
    """Seconds of FSDP2 in a step: (beside computation, in its way).

    What is gathered crosses from host to host once for all GPUs of a host, through all of its network cards.
    """
    rate = gpu.peers if weights.ranks <= GPUS_A_HOST else min(gpu.peers, GPUS_A_HOST * gpu.network)
    beside = weights.gathered_bytes() + weights.reduced_bytes()
    return beside / rate, weights.rebuilt_bytes(kept.rebuilt) / rate


# Matrix products of a layer in a step, in forward passes of it: forward, replay, gradient of the inputs, K and V once
# more; training every weight adds the gradients of the weights. A replay leaves out the products that nobody reads.
ADAPTER_PASSES, FULL_PASSES = 3.14, 4.14
# Passes of one layer's forward over device memory outside of matrix products, in hidden and intermediate sizes a
# token, over Liger's kernels: with LoRA on every linear, and without adapters. The step makes so many times more.
GATED_TRAFFIC, PLAIN_TRAFFIC, FULL_TRAFFIC, STEP_TRAFFIC = (24, 11), (34, 7), (14, 8), 3.48
# The same where a token visits experts, in hidden sizes for each of them and in their widths together: as one
# operation, fitted to a step of gpt-oss-20b on one H200 (128K tokens: 16.2 s), and as the model has them, fitted to
# two layers of Qwen3-30B-A3B's. gpt-oss's own, with biases and a gate of many steps, take 1.8 times as much as that.
FUSED_EXPERT_TRAFFIC, EXPERT_TRAFFIC = (8, 8), (35, 35)
# A rebuilt input also makes its way to the store and back.
REBUILD_TRAFFIC = 2
# Of device memory, a logit: its value twice and its gradient; and where the head trains, for every weight of it and
# every chunk of the loss, a gradient added to a sum in fp32.
LOGIT_BYTES, HEAD_SUM_BYTES = 7, 12
# Passes over device memory of weights that are dequantised for a layer: written, and read packed. By counting bytes.
WHOLE_TRAFFIC = 1.5


def step_seconds(step: StepSizes, kept: KeptLayers, gpu: GPU, *, full: bool) -> float:
    """Seconds that every rank of the group computes in one step, copies to and from the host all under it.

    A linear whose output was kept is not computed again: 2 · in · out operations a token less, at products' rate.
    """
    m, tokens = step.model, step.batch * step.plan.n_tokens / step.plan.sp_size
    rest = tokens * _traffic(step, full=full) * step.element_bytes / gpu.memory
    every = FULL_PASSES if full else ADAPTER_PASSES
    passes = [every + _passes_beside(m, layer) for layer in range(m.layers)]
    rates = gpu.attention_rates(m.head_dim, m.value_dim)
    attention = {window: _attention(step, window) for window in set(step.windows)}
    seconds = 0.0
    for (window, mix, passed), layers in Counter(zip(step.windows, m.all_mixes, passes, strict=True)).items():
        forward, backward = (operations / rate for operations, rate in zip(attention[window], rates, strict=True))
        token_wise = passed * _linear_seconds(m, mix, tokens, gpu) + STEP_TRAFFIC * rest
        scans = tokens * SCAN_PASSES * _scan_seconds(mix, step, gpu)
        seconds += layers * ((forward + backward) * mix.attends + token_wise + scans)
    windows, mixes = step.windows_of_last(kept.layers), step.mixes_of_last(kept.layers)
    reruns = Counter(window for window, there in zip(windows, kept.attentions, strict=True) if not there)
    again = sum(count * attention[window][0] for window, count in reruns.items()) / rates[0]
    # A rebuilt input is made by the layer below it.
    for layer, (there, mix) in enumerate(zip(kept.inputs[1:], mixes[:-1], strict=True)):
        made = _linear_seconds(m, mix, tokens, gpu) + REBUILD_TRAFFIC * rest + tokens * _scan_seconds(mix, step, gpu)
        spared = sum(spared_operations(step, kept, layer, chunk) for chunk in step.plan.chunks) if not there else 0.0
        again += made * (not there) - spared / gpu.matmul
    again -= saved_operations(step, kept) / gpu.matmul
    whole = (2 * m.layers + kept.rebuilt) * WHOLE_TRAFFIC * step.whole_bytes / gpu.memory
    return seconds + again + whole + _head_seconds(step, tokens, gpu, full=full)


def _traffic(step: StepSizes, *, full: bool) -> float:
    """Elements of a token that pass through device memory in a layer's forward outside of matrix products."""
    m = step.model
    hidden, intermediate = FULL_TRAFFIC if full else GATED_TRAFFIC if m.gated else PLAIN_TRAFFIC
    if m.experts:
        row, intermediate = FUSED_EXPERT_TRAFFIC if step.fused_experts else EXPERT_TRAFFIC
        hidden += row * m.experts
    return hidden * m.hidden + intermediate * m.intermediate


# The scan of a recurrent layer goes through tiles of tokens on the matrix units, and takes as long as so many
# operations of its formula at the rate of large products; then its backward pass, forward passes of it. From the gated
# delta rule of flash-linear-attention on one H100 (32 heads of 128 x 128, 32K tokens: 2.5 ms forward, 7.2 backward).
SCAN_SLOWER, SCAN_PASSES = 16.0, 2 + 2.9
# Passes over device memory around it, in channels of its convolutions a token.
SCAN_TRAFFIC = 12


def _scan_seconds(mix: LayerMix, step: StepSizes, gpu: GPU) -> float:
    """Of one token, forward."""
    return (
        SCAN_SLOWER * mix.scan_operations / gpu.matmul + SCAN_TRAFFIC * mix.channels * step.element_bytes / gpu.memory
    )


def _linear_seconds(m: ModelSizes, mix: LayerMix, tokens: float, gpu: GPU) -> float:
    """One layer's products, forward."""
    return 2 * tokens * (mix.linear_weights if m.mixes else m.met_parameters) / gpu.matmul


# A kernel computes whole tiles of keys, and a window has two edges: it takes the time of so many keys more a query,
# forward and backward. A compromise between those of one H100 (flash-attn-4 4.0.0b36, rows of 32K queries, windows of
# 4,096, 1,024 and 128 keys, heads of 64, 128 and 256): 233 to 635 forward, 465 to 1,139 backward.
WINDOW_EXTRA_KEYS = (500, 850)


def _attention(step: StepSizes, window: int | None) -> tuple[float, float]:
    """Operations that take as long as one layer's attention on every rank, forward and backward.

    Without a window they are those that it makes; with one they are a few more, but never more than without.
    """
    m, n_tokens = step.model, step.plan.n_tokens
    share = step.batch / step.plan.sp_size
    every, seen = (seen_pairs(0, n_tokens, reach, step.documents) for reach in (None, window))
    extra = (0, 0) if window is None else WINDOW_EXTRA_KEYS
    forward, backward = (share * min(every, seen + n_tokens * keys) for keys in extra)
    return m.attention_forward(forward), m.attention_backward(backward)


def _passes_beside(m: ModelSizes, layer: int) -> float:
    """In passes of the layer's products: what a step makes beside q, with K and V, less what a replay leaves out.

    By the layer's linears, where they are known and are all that it multiplies by; else as Llama and GPT-NeoX do.
    """
    linears, weights = m.linears_of(layer), m.all_mixes[layer].linear_weights if m.mixes else m.met_parameters
    if not linears or m.experts:
        unread = m.hidden * m.intermediate + (0 if m.gated else m.hidden**2)
        return -unread / max(unread, m.met_parameters)
    again = sum(linear.inputs * linear.outputs for linear in linears)
    captured = sum(linear.inputs * linear.outputs for linear in linears if linear.captured)
    beside_kv = max(0, captured - m.hidden * m.kv_heads * (m.head_dim + m.value_dim))
    return (beside_kv - max(0, weights - again)) / weights


def _head_seconds(step: StepSizes, tokens: float, gpu: GPU, *, full: bool) -> float:
    products = (3 if full else 2) * 2 * tokens * step.vocabulary * step.model.hidden / gpu.matmul
    sums = HEAD_SUM_BYTES * step.model.hidden / max(1, step.loss_tokens) if full else 0
    return products + (LOGIT_BYTES + sums) * tokens * step.vocabulary / gpu.memory
