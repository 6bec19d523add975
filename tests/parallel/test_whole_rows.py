"""Log-probabilities of whole rows that every rank of a group is given, against whole logits of a plain model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_fpdt import FPDTPlugin, ShardingCollator, apply_fpdt, chunked_log_probs
from hf_fpdt.layout import ChunkPlan
from hf_fpdt.model.scoring import log_probs as door
from hf_fpdt.model.scoring import router
from hf_fpdt.parallel import whole_rows
from tests.helpers.models import TOLERANCE, tiny
from tests.helpers.recurrent import recurrent
from tests.helpers.support import assert_rejects, relative_error, spawn
from tests.parallel.test_sequence_parallel import CHUNK, gradients, shard

TEMPERATURE = 0.7
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {**EXPERTS, **ROUTED},
    "gemma2": {
        "attention": "eager",
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
        "sliding_window": 20,
    },
}
# Tokens of a row: no multiple of the ranks, the last chunk of as many tokens as there are ranks, fewer than a chunk.
LENGTHS = (43, 34, 7)


def made(name: str) -> Any:
    """A float64 model."""
    torch.manual_seed(0)
    model = tiny(name, **MODELS[name]) if name in MODELS else recurrent(name)
    if name == "qwen3_moe":  # other ways to run experts have no float64
        model.set_experts_implementation("eager")
    return model


def rows(kind: str, n_tokens: int, index: int) -> dict[str, Tensor]:
    """Two rows of a data-parallel group, or one packed row, with labels of which some do not count."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(3, 80, (1 if kind == "packed" else 2, n_tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    labels[:, 0] = -100
    if kind == "packed":
        positions = torch.cat([torch.arange(n_tokens // 3), torch.arange(n_tokens - n_tokens // 3)])
        labels[:, n_tokens // 3] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": positions[None]}
    mask = torch.ones_like(ids)
    if kind == "right":
        mask[1, -n_tokens // 3 :] = 0
    if kind == "left":
        mask[1, : n_tokens // 3] = 0
        labels[1, n_tokens // 3] = -100
    labels = labels.masked_fill(mask == 0, -100)
    if kind == "told":  # what comes after the end of a row that another one follows
        mask[0, -n_tokens // 3 :], labels[0, -n_tokens // 3 :] = 0, -100
        labels[0, -n_tokens // 3] = 7
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def loss_of(found: dict[str, Tensor], aux_loss: Tensor | None) -> Tensor:
    """Each token has a factor of its own, as preferences have; nothing is divided by a number of tokens."""
    log_probs = found["log_probs"]
    factors = torch.linspace(-1, 2, log_probs.numel(), dtype=torch.float64).view_as(log_probs)
    loss = (log_probs * factors).sum() + 0.1 * found["entropy"].sum()
    return loss if aux_loss is None else loss + 0.3 * aux_loss**2


def whole_logits(
    model: Any, batch: dict[str, Tensor], temperature: float = TEMPERATURE
) -> tuple[dict[str, Tensor], Tensor | None]:
    """By PyTorch, of the plain model; documents of a packed row one at a time."""
    labels, given = batch["labels"], {name: value for name, value in batch.items() if name != "labels"}
    starts = (given["position_ids"][0] == 0).nonzero().flatten().tolist() if "position_ids" in given else [0]
    edges = [*starts, labels.shape[1]]
    parts = [{n: v[:, a:b] for n, v in given.items()} for a, b in zip(edges[:-1], edges[1:], strict=True)]
    outputs = [model(**part, use_cache=False) for part in parts]
    logits = torch.cat([each.logits for each in outputs], dim=1).double()[:, :-1] / temperature
    log_p, targets = logits.log_softmax(-1), labels[:, 1:]
    counted = targets != -100
    found = {"log_probs": log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0]}
    found["entropy"] = -(log_p.exp() * log_p).sum(-1)
    found["mean_logits"], found["is_top1"] = logits.mean(-1), (logits.argmax(-1) == targets).double()
    found = {name: value.where(counted, 0) for name, value in found.items()}
    aux = outputs[0].get("aux_loss")
    return found, aux if len(outputs) == 1 or aux is None else _packed_router_loss(model, outputs, parts)


def _packed_router_loss(model: Any, outputs: list[Any], parts: list[dict[str, Tensor]]) -> Tensor:
    """Of all tokens of the row: transformers' own, of the documents' router logits one after another."""
    home = __import__(type(model).__module__, fromlist=["load_balancing_loss_func"])
    logits = tuple(torch.cat(layer) for layer in zip(*(each.router_logits for each in outputs), strict=True))
    loss: Tensor = home.load_balancing_loss_func(logits, model.num_experts, model.num_experts_per_tok)
    return loss


Case = tuple[str, str, int]  # family, kind of rows, tokens


def check(case: Case, groups: int, model: nn.Module, found: dict[str, Tensor], index: int) -> None:
    """What is found is that of whole logits; gradients, averaged over all ranks, are the mean over groups."""
    plain = made(case[0])
    for group in range(groups):
        exact, aux = whole_logits(plain, rows(*case[1:], group))
        (loss_of(exact, aux) / groups).backward()
        if group == index:
            for name, value in exact.items():
                error = relative_error(found[name].double().cpu(), value.detach())
                assert error < TOLERANCE, f"{case}: {name} {error:.1e}"
    ours, truth = gradients(model), gradients(plain)
    assert ours.keys() == truth.keys()
    for name, grad in truth.items():
        error = float((ours[name].cpu() - grad).abs().max()) / max(float(grad.abs().max()), 1e-6)
        assert error < 5 * TOLERANCE, f"{case}, {name}: {error:.1e}"


def step(case: Case, sp: int, rank: int, wrap: str, device: str = "cpu") -> None:
    model: Any = made(case[0]).to(device)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=sp, loss_chunk_tokens=10))
    if wrap == "fsdp":
        shard(model, True, None)
    wrapped = DistributedDataParallel(model) if wrap == "ddp" else model
    batch = {name: value.to(device) for name, value in rows(*case[1:], rank // sp).items()}
    asked, embedded = ("entropy", "mean_logits", "is_top1"), list[int]()
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: embedded.append(ids[0].numel()))
    answer: Any = chunked_log_probs(wrapped, temperature=TEMPERATURE, outputs=asked, **batch)  # type: ignore[arg-type]
    assert not answer.mean_logits.requires_grad and answer.is_top1.dtype == torch.bool
    assert torch.equal(answer.label_mask, batch["labels"][:, 1:] != -100)
    # Of padding none is computed but what fills up ranks, and pairs of a recurrent layer's tokens.
    if case[1] != "told":
        real = int(batch.get("attention_mask", torch.ones_like(batch["labels"])).sum())
        assert embedded[-1] - -(-real // sp) in ((0,) if case[0] in MODELS else (0, 1))
    loss_of(answer, answer.aux_loss).backward()
    check(case, dist.get_world_size() // sp, wrapped, answer, rank // sp)


def _steps(rank: int, world: int, sp: int, wrap: str, cases: list[Case]) -> None:
    for case in cases:
        step(case, sp, rank, wrap)


CASES: list[Case] = [
    *(("llama", "right", n_tokens) for n_tokens in LENGTHS),
    *(("llama", kind, 43) for kind in ("left", "packed", "told")),
    *(("qwen3_moe", kind, 43) for kind in ("right", "left", "packed")),
    *(("gemma2", kind, 43) for kind in ("right", "packed")),
    *(("qwen3_5_text", kind, n_tokens) for kind, n_tokens in (("right", 43), ("packed", 34))),
]


def test_two_ranks_find_what_whole_logits_say() -> None:
    spawn(_steps, 2, 2, "ddp", CASES)


def labelled(rank: int, world: int) -> None:
    """The model's own loss of a rank's part, with that of its routers: its mean over ranks, or its sum over tokens."""
    for kind in ("right", "packed"):
        model, plain = made("qwen3_moe"), made("qwen3_moe")
        apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=2, loss_chunk_tokens=10))
        wrapped = DistributedDataParallel(model)
        groups = [rows(kind, 43, group) for group in range(world // 2)]
        own = ShardingCollator(lambda batch: batch, 2, rank % 2, CHUNK)(groups[rank // 2])  # type: ignore[arg-type]
        for number in (None, 50):
            found, auxes = list[Tensor](), list[Any]()
            for group in groups:
                exact, aux = whole_logits(plain, group, 1.0)
                assert aux is not None
                count = (group["labels"][:, 1:] != -100).sum() if number is None else number
                # Losses over a number of tokens are added up over ranks: beside a factor of all ranks, DDP's mean is.
                found.append(-exact["log_probs"].sum() / count + 0.7 * aux)
                auxes.append(aux)
            truth = torch.stack(found).mean() if number is None else torch.stack(found).sum() / world
            truth.backward()
            outputs = wrapped(**own, num_items_in_batch=number)
            outputs.loss.backward()
            assert relative_error(outputs.aux_loss, auxes[rank // 2].detach()) < TOLERANCE
            ours, theirs = gradients(wrapped), gradients(plain)
            for name, grad in theirs.items():
                assert relative_error(ours[name], grad) < 10 * TOLERANCE, f"{kind}, {number}, {name}"
            model.zero_grad(), plain.zero_grad()


def _several(rank: int, world: int) -> None:
    _steps(rank, world, 2, "ddp", [("qwen3_moe", "right", 43), ("llama", "left", 34)])
    _steps(rank, world, 4, "fsdp", [("llama", "packed", 43)])
    _steps(rank, world, 2, "fsdp", [("qwen3_moe", "left", 43)])
    labelled(rank, world)


def test_groups_of_ranks_and_fsdp2() -> None:
    spawn(_several, 4)


def _broken(rank: int, world: int) -> None:
    case: Case = ("qwen3_moe", "right", 43)
    step(case, 2, rank, "ddp")
    assert_rejects(lambda bug: _with(bug, case, rank), {bug.__name__: bug for bug in BUGS})
    batch, model = rows("right", 43, 0), made("llama")
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=2))
    swapped = {name: value.flip(0) if rank else value for name, value in batch.items()}
    own = ShardingCollator(lambda given: given, 2, rank, CHUNK)(batch)  # type: ignore[arg-type]
    for given, why in (
        (swapped, "different samples"),
        (rows("right", 43, rank), "different samples"),
        (own, "was cut"),
    ):
        with pytest.raises(ValueError, match=why):
            chunked_log_probs(model, **given)


def _with(bug: Any, case: Case, rank: int) -> None:
    with bug():
        step(case, 2, rank, "ddp")


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


@contextmanager
def out_of_order() -> Iterator[None]:
    """Ranks' parts one after another."""

    def parts(plan: ChunkPlan, rank: int, device: Any) -> Tensor:
        size = plan.n_tokens // plan.sp_size
        return torch.arange(rank * size, (rank + 1) * size)

    with changed(whole_rows, "own_tokens", parts):
        yield


RIGHT = whole_rows._Gathered


class Once(RIGHT):
    """A rank's part counts once: the mean over ranks halves it."""

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> Any:
        return RIGHT.backward(ctx, d_whole / ctx.group.size)


class OfEachRank(RIGHT):
    """All ranks' gradients are added up, of which each is the whole already."""

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> Any:
        return RIGHT.backward(ctx, ctx.group.sum(d_whole))


@contextmanager
def counted_once() -> Iterator[None]:
    with changed(whole_rows, "_Gathered", Once):
        yield


@contextmanager
def counted_by_each_rank() -> Iterator[None]:
    with changed(whole_rows, "_Gathered", OfEachRank):
        yield


@contextmanager
def shifted_mask() -> Iterator[None]:
    right = door.shifted
    with changed(door, "shifted", lambda labels: right(labels.roll(1, 1))):
        yield


@contextmanager
def lost_temperature() -> Iterator[None]:
    right = door.log_probs_by_chunks
    with changed(door, "log_probs_by_chunks", lambda *a, **k: right(*a, **{**k, "temperature": 1.0})):
        yield


@contextmanager
def routers_of_own_tokens() -> Iterator[None]:
    with changed(router, "summed", lambda group, value: value):
        yield


@contextmanager
def padding_counts() -> Iterator[None]:
    right = router.RouterSums

    def sums(top_k: int, weights: Any, group: Any = None) -> Any:
        return right(top_k, weights) if group is None else right(top_k, None, group)

    with changed(router, "RouterSums", sums):
        yield


BUGS = (
    *(out_of_order, counted_once, counted_by_each_rank, shifted_mask, lost_temperature),
    *(routers_of_own_tokens, padding_counts),
)


def test_the_check_rejects_broken_answers() -> None:
    spawn(_broken, 2)
