"""A training step played through with plain lists, for `test_tiers`: who lies where, one put and take a time."""

from __future__ import annotations

from collections import Counter

from hf_fpdt.plan.checkpointing import KeptLayers, forward_bytes
from hf_fpdt.plan.kv_bytes import KVBytes
from hf_fpdt.plan.layer_bytes import LayerBytes
from hf_fpdt.plan.rehearsal import Forecast
from hf_fpdt.plan.tiers import Budgets, ExistingBuffers
from hf_fpdt.units import page_rounded


def replayed(
    kept: KeptLayers, sizes: LayerBytes, kv: KVBytes, budgets: Budgets, have: ExistingBuffers
) -> Forecast | None:
    """What `plan.rehearsal.forecast` should tell, found without its classes."""
    # Host buffers of checkpoints, and of K, V and their gradients.
    frees = {False: sorted(size for size, count in have.checkpoints.items() for _ in range(count)), True: list[int]()}
    mades = {False: list(frees[False]), True: list[int]()}
    last = len(kv.parts) - 1
    widths = {"K": kv.parts, "V": kv.value_parts or kv.parts, "dK": kv.grads, "dV": kv.value_grads or kv.grads}
    of_kv = [n for name in ("K", "V") for n in widths[name][kv.backward_resident : last]]
    of_kv += [n for name in ("dK", "dV") for n in widths[name][kv.backward_resident : max(0, last - 1)]]
    windowed = kv.windowed or (False,) * kept.layers
    reserved = 0 if all(windowed) else sum(map(page_rounded, of_kv))
    limits = {False: max(0, budgets.host - reserved), True: budgets.host}
    used, most = Counter[str](), Counter[str]()
    there: dict[tuple[int, str, int], tuple[str, int, int]] = {}
    chunks, put_bytes = len(sizes.inputs), 0
    nbytes_of = {"input": sizes.inputs, "out": sizes.outs, "lse": sizes.lses}
    states = sizes.states or ({},) * kept.layers
    # (layer, name, chunk) of each output of a linear that is kept: where it lies, and how long it is.
    linears = {
        (layer, linear.name, chunk): ("device" if chunk >= chunks - count.on_device else "host", linear.chunks[chunk])
        for layer, counts in enumerate(kept.linears)
        for count, linear in zip(counts, sizes.linears[layer], strict=True)
        for chunk in range(chunks - count.kept, chunks)
    }
    apart = Counter[str]()
    for tier, nbytes in linears.values():
        apart[tier] += nbytes
    total = forward_bytes(kept, sizes) - apart.total()

    def put(key: tuple[int, str, int], nbytes: int, tiers: list[str]) -> None:
        for tier in tiers:
            size = 0
            if tier == "host":
                free, made, new = frees[key[0] < 0], mades[key[0] < 0], page_rounded(nbytes)
                fits = [buffer for buffer in free if buffer >= nbytes]
                may_grow = sum(made) + new <= limits[key[0] < 0]
                if fits and 2 * fits[0] > 3 * new and may_grow:
                    fits = []  # much longer than need be
                size = fits[0] if fits else new
                if fits:
                    free.remove(size)
                elif may_grow:
                    made.append(size)
                else:
                    continue
            elif used[tier] + nbytes > (budgets.device if tier == "device" else budgets.disk):
                continue
            used[tier] += nbytes
            most[tier] = max(most[tier], used[tier])
            there[key] = tier, nbytes, size
            return
        raise MemoryError

    def take(key: tuple[int, str, int]) -> None:
        tier, nbytes, size = there.pop(key, ("", 0, 0))
        used[tier] -= nbytes
        if tier == "host":
            frees[key[0] < 0].append(size)
            frees[key[0] < 0].sort()

    def keep(layer: int, name: str, chunk: int, rebuilt: bool) -> None:
        nonlocal put_bytes
        left, nbytes = total - put_bytes, nbytes_of[name][chunk] if name in nbytes_of else states[layer][name]
        tiers = ["device", "host", "disk"]
        if not rebuilt:
            put_bytes += nbytes
            if left > budgets.device + limits[False] - apart.total():
                tiers = ["disk", "host"]
            elif left > budgets.device - apart["device"]:
                tiers = ["host", "device", "disk"]
        put((layer, name, chunk), nbytes, tiers)

    def keep_linears(layer: int, chunk: int, late: bool) -> None:
        for linear in sizes.linears[layer] if kept.linears else ():
            if linear.late == late and (key := (layer, linear.name, chunk)) in linears:
                put(key, linears[key][1], [linears[key][0]])

    def put_kv(layer: int, chunk: int, resident: int) -> None:
        for name in ("K", "V"):
            if resident <= chunk < chunks - 1 and not windowed[layer]:
                put((-1, name, chunk), widths[name][chunk], ["host"])

    def drop_kv() -> None:
        for key in [key for key in there if key[0] == -1]:
            take(key)

    def forward(layer: int, keeps_input: bool, keeps_row: bool, above: bool) -> None:
        for chunk in range(chunks):
            if keeps_input:
                keep(layer, "input", chunk, above)
            if not above:
                keep_linears(layer, chunk, False)
            if not above or keeps_row:
                put_kv(layer, chunk, kv.forward_resident)
            for name in ("out", "lse") if keeps_row and (not sizes.attends or sizes.attends[layer]) else ():
                keep(layer, name, chunk, above)
            if not above:
                keep_linears(layer, chunk, True)
            for name in states[layer] if not above and chunk + 1 < chunks else ():
                keep(layer, name, chunk + 1, above)
            if above:
                keep(layer + 1, "input", chunk, True)
        drop_kv()

    def backward(layer: int) -> None:
        for chunk in range(chunks - 1):
            put_kv(layer, chunk, kv.backward_resident)
        for chunk in reversed(range(chunks)):
            for key in [key for key in there if key[0] == layer and key[2] == chunk]:
                take(key)
            for earlier in range(kv.backward_resident, chunks - 2) if chunk == chunks - 1 else ():
                for name in () if windowed[layer] else ("dK", "dV"):
                    put((-1, name, earlier), widths[name][earlier], ["host"])
        drop_kv()

    try:
        for layer in range(kept.layers):
            forward(layer, kept.inputs[layer], kept.attentions[layer], False)
        for layer in reversed(range(kept.layers)):
            base = max(index for index in range(layer + 1) if (index, "input", 0) in there)
            for below in range(base, layer):
                forward(below, False, not kept.attentions[below], True)
            backward(layer)
    except MemoryError:
        return None
    assert not there
    host = sum(map(sum, mades.values()))
    if host > budgets.host:
        return None
    new = {of_kv: dict(Counter(made) - Counter({} if of_kv else have.checkpoints)) for of_kv, made in mades.items()}
    return Forecast(kept, most["device"], host, most["disk"], new[False], new[True])
