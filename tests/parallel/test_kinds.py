"""Windows, sinks, softcap and latent attention on several ranks: many gloo processes against one plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.memory.windowed_kv import WindowedKV
from hf_fpdt.model.experts.replace import are_experts
from hf_fpdt.model.patch import is_patched
from hf_fpdt.parallel.group import SequenceParallelGroup
from tests.helpers.kinds import TOLERANCE, Forgets, in_double, kind, ring, with_adapters
from tests.helpers.support import assert_rejects, relative_error, spawn
from tests.parallel.test_sequence_parallel import CHUNK, gradients, own_batch, sample, shard, stacked

Run = tuple[str, int, int, dict[str, Any]]  # family, sp_size, window, what else the plugin is given
TOKENS = 63


def model_of(case: str, window: int) -> Any:
    """A family of `kinds`, with "+lora" a PEFT model around it."""
    name, _, lora = case.partition("+")
    named = {"llama4_text": "attention_chunk_size"}.get(name, "sliding_window")
    windowed: dict[str, Any] = {} if name.startswith("deepseek") else {named: window}
    model = kind(name, vocab_size=97, tie_word_embeddings=False, **windowed)
    return with_adapters(model) if lora else model


def check(case: str, window: int, samples: int, model: nn.Module, loss: Tensor, index: int = 0) -> None:
    """Loss (mean over ranks) and, DDP or FSDP having averaged them, the gradients are those of the plain model."""
    plain = model_of(case, window)
    losses = [plain(**stacked([sample(each + index, TOKENS)])).loss for each in range(samples)]
    (torch.stack(losses).mean()).backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    assert relative_error(mean / dist.get_world_size(), torch.stack(losses).mean().detach()) < TOLERANCE
    ours, exact = gradients(model), gradients(plain)
    assert ours.keys() == exact.keys()
    found: list[Any] = list(filter(are_experts, model.modules()))
    for experts in found:
        assert is_patched(experts) == (experts.config._experts_implementation == "grouped_mm")
    floor = 1e-3 * max(float(grad.abs().max()) for grad in exact.values())
    for name, grad in exact.items():
        error = float((ours[name] - grad).abs().max()) / max(float(grad.abs().max()), floor)
        assert error < TOLERANCE, f"{case}, window {window}: {name}: {error:.1e}"


def applied(case: str, sp: int, window: int, **options: Any) -> Any:
    model = model_of(case, window)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, sp_size=sp, loss_chunk_tokens=10, **options))
    return model


def experts_as_one(model: nn.Module) -> None:
    """From now on; layers were tried with the model's own loop over them, the only other one in float64."""
    found: list[Any] = list(filter(are_experts, model.modules()))
    for module in found:
        module.config._experts_implementation = "grouped_mm"


def _ddp(rank: int, world: int, runs: list[Run]) -> None:
    with in_double():
        for case, sp, window, options in runs:
            wrapped = DistributedDataParallel(applied(case, sp, window, **options))
            experts_as_one(wrapped)
            loss = wrapped(**own_batch(sp, rank, TOKENS)).loss
            loss.backward()
            check(case, window, world // sp, wrapped, loss)
            with torch.no_grad():
                evaluated = wrapped.eval()(**own_batch(sp, rank, TOKENS)).loss
            assert relative_error(evaluated, loss.detach()) < TOLERANCE, f"{case}, window {window}: in evaluation"


HOST: dict[str, Any] = {"device_budget_gib": 0, "host_budget_gib": 1}


def test_two_ranks_equal_one_process() -> None:
    """Windows smaller than a piece of a chunk, of several chunks, longer than a rank's tokens; data-parallel too."""
    runs: list[Run] = [("mistral", 2, window, {}) for window in (1, 7, 9, 16, 17, 33, 40, 62, 64)]
    runs += [("gpt_oss", 2, 9, {}), ("gpt_oss+lora", 2, 20, {}), ("gpt_oss", 1, 20, HOST), ("gemma2", 2, 20, {})]
    runs += [("deepseek_v3", 2, 0, {}), ("gpt_oss", 2, 20, {"checkpoints": "segment", **HOST})]
    runs += [("llama4_text", 2, block, {}) for block in (3, 8, 10, 16, 20)]  # its queries are scaled by their place
    spawn(_ddp, 2, runs)


def test_four_ranks_equal_one_process() -> None:
    """Two key/value heads for four ranks; each rank has one query head and one sink."""
    spawn(_ddp, 4, [("gpt_oss", 4, 20, {}), ("mistral", 4, 9, {}), ("gpt_oss", 2, 9, {}), ("qwen2_moe", 4, 20, {})])


def _fsdp(rank: int, world: int, runs: list[Run]) -> None:
    with in_double():
        for case, sp, window, options in runs:
            model = applied(case, sp, window, **options)
            shard(model, True, None)
            for _ in range(2):  # the second step starts from resharded weights
                model.zero_grad()
                loss = model(**own_batch(sp, rank, TOKENS)).loss
                loss.backward()
                check(case, window, world // sp, model, loss)
                experts_as_one(model)  # layers are tried in the first step, too


def test_fsdp2_equals_one_process() -> None:
    rebuilt = {"checkpoints": "segment", **HOST}
    spawn(_fsdp, 2, [("gpt_oss", 1, 9, {}), ("gpt_oss", 2, 20, rebuilt), ("mistral", 2, 9, {}), ("gemma2", 1, 9, {})])


def _accumulated(rank: int, world: int) -> None:
    """Sinks get their gradient once a step, and the sums are right."""
    with in_double():
        model = applied("gpt_oss", 2, 9)
        wrapped = DistributedDataParallel(model)
        fired: dict[str, int] = {}
        for name, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda _, name=name: fired.update({name: fired.get(name, 0) + 1}))
        with wrapped.no_sync():
            (wrapped(**own_batch(2, rank, TOKENS, 0)).loss / 2).backward()
        last = wrapped(**own_batch(2, rank, TOKENS, 1)).loss
        (last / 2).backward()
        assert set(fired.values()) == {2} and any("sinks" in name for name in fired)
        plain = model_of("gpt_oss", 9)
        for index in range(2):
            (plain(**stacked([sample(index, TOKENS)])).loss / 2).backward()
        exact = gradients(plain)
        for name, grad in gradients(wrapped).items():
            assert relative_error(grad, exact[name]) < TOLERANCE, name


def test_gradient_accumulation_under_ddp() -> None:
    spawn(_accumulated, 2)


def _broken(rank: int, world: int, bug: str) -> None:
    with pytest.MonkeyPatch.context() as patch, in_double():
        if bug == "the sinks of other heads":
            patch.setattr(SequenceParallelGroup, "own_heads", lambda self, heads: slice(0, heads // self.size))
        wrapped = DistributedDataParallel(applied("gpt_oss", 2, 20))
        with ring(Forgets if bug == "a ring that forgets" else WindowedKV):
            loss = wrapped(**own_batch(2, rank, TOKENS)).loss
            loss.backward()
        check("gpt_oss", 19 if "window" in bug else 20, 1, wrapped, loss)


def test_the_check_rejects_broken_ranks() -> None:
    bugs = ["the sinks of other heads", "a ring that forgets", "a window of one key more"]
    assert_rejects(lambda bug: spawn(_broken, 2, bug), {bug: bug for bug in bugs})
