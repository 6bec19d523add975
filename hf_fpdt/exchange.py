"""Seconds that GPUs take to send each other what a step exchanges. Numbers only; no torch.

An all-to-all of Ulysses (`comms`; paper sections 2 and 4.1) stands in the way: the stream that computes waits for it,
and what comes next reads what it brought. Its time counts in full, and so does that of the copies around it that bring
heads into order. Only copies to and from the host go on meanwhile.

FSDP2 gathers weights one layer ahead and reduces gradients of the layer before, on streams of its own: that is beside
computation, and a step waits for it only where it takes longer. It fetches ahead for backward passes alone, so what is
gathered once more to rebuild an input is counted as in the way.
"""

from __future__ import annotations

from .keep import Kept
from .memory import StepSizes
from .planner import Collectives, ShardedWeights, StepPlan
from .rates import GPU

# GPUs that NVLink joins; more of them are on several hosts, each GPU with a network card of its own.
GPUS_A_HOST = 8
# Passes over device memory for the copies around exchanges, each of which reads and writes: dq, dk, dv, which go back
# to pieces together, are copied twice (N + 2 G of 6 N + 6 G heads: a fifth), all else once.
COPY_PASSES = 2
ORDER_PASSES = 1.2 * COPY_PASSES


def ulysses(step: StepSizes, kept: Kept) -> Collectives:
    """The exchanges of a step, and the bytes that one rank sends to others in them.

    In each layer, for each token of its own, a rank exchanges tensors of N query and G key/value heads (repeated until
    the ranks divide them) with H elements a head:

        forward    q, k, v, out                                        2 N + 2 G
        backward   k, v again; q, out of the replay; dout, dq, dk, dv  4 N + 4 G
        rebuild    forward again, 2 N + 2 G; out alone, N, where attention's output was kept

    and one part in `sp_size` stays. That attention's output was kept saves none in the replay: it is kept for a rank's
    heads, and backward needs it for the rank's tokens, and q for its heads.

    Args:
        step: of a model that trains in every layer's attention.
        kept: what the step keeps.
    """
    m, plan = step.model, step.plan
    return StepPlan(
        n_tokens=plan.n_tokens,
        chunk_tokens=plan.chunk_tokens,
        sp_size=plan.sp_size,
        layers=m.layers,
        q_heads=m.q_heads,
        kv_heads=m.kv_heads,
        head_dim=m.head_dim,
        batch=step.batch,
        element_bytes=step.attention_bytes,
        backward_layers=kept.layers,
        rebuilt_layers=kept.rebuilt,
        rebuilt_attentions=kept.rebuilt_attentions,
    ).step()


def ulysses_seconds(step: StepSizes, kept: Kept, gpu: GPU) -> float:
    """Seconds of a step in which nothing is computed, as GPUs exchange heads for pieces of the sequence.

    A rank sends as much to each of the others; those of its host and the rest at the same time.
    """
    ranks = step.plan.sp_size
    if ranks == 1:
        return 0.0
    sent = ulysses(step, kept).sent_bytes
    inside = min(ranks, GPUS_A_HOST) - 1
    outside = ranks - 1 - inside
    on_the_way = sent / (ranks - 1) * max(inside / gpu.peers, outside / gpu.network)
    return on_the_way + ORDER_PASSES * sent * ranks / (ranks - 1) / gpu.memory


def sharded_seconds(weights: ShardedWeights, kept: Kept, gpu: GPU) -> tuple[float, float]:
    """Seconds of FSDP2 in a step: (beside computation, in its way).

    What is gathered crosses from host to host once for all GPUs of a host, through all of its network cards.
    """
    rate = gpu.peers if weights.ranks <= GPUS_A_HOST else min(gpu.peers, GPUS_A_HOST * gpu.network)
    beside = weights.gathered_bytes() + weights.reduced_bytes()
    return beside / rate, weights.rebuilt_bytes(kept.rebuilt) / rate
