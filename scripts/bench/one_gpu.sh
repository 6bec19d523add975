#!/usr/bin/env bash
# The measurements of docs/results/benchmarks.md on one GPU:  bash scripts/bench/one_gpu.sh TABLE [options of hf-fpdt bench]
# TABLE: lora-8b lora-8b-long full-1b lora-neox attention longest. Later options win, e.g. --seq-len 32K --stacks fpdt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${OUT:-out/bench}"
mkdir -p "$out"
everyone=(fpdt fpdt-host hf liger hf-offload alst)
export PYTHONPATH="$PWD:$PWD/scripts/bench${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

bench() { # TABLE OPTION...
    local table="$1"
    shift
    python -m hf_fpdt.commands.main bench "$@" --csv "$out/$table.csv" --json "$out/$table.jsonl"
}

attention() {
    local shape="$out/attention-only" chunk
    python scripts/bench/attention_only.py "$shape"
    # DeepSpeed's FPDT keeps all of q, k, v and outputs on the host; so does ours here.
    for chunk in 64K 32K; do
        bench attention "$shape" --full --seq-len 256K --steps 3 --chunk-tokens "$chunk" \
            --stacks fpdt-host deepspeed_fpdt:DeepSpeedFpdt "$@"
    done
}

table="${1:?a table is expected: lora-8b lora-8b-long full-1b lora-neox attention longest}"
shift
case "$table" in
lora-8b) bench "$table" --shape llama-8b --seq-len 32K 64K 128K --steps 2 --stacks "${everyone[@]}" "$@" ;;
lora-8b-long) bench "$table" --shape llama-8b --layers 8 --seq-len 256K 512K --steps 2 --stacks fpdt "$@" ;;
full-1b) bench "$table" --shape llama-1b --full --seq-len 128K 256K --steps 2 --stacks "${everyone[@]}" "$@" ;;
lora-neox) bench "$table" --shape neox-6.9b --seq-len 256K --steps 2 --stacks fpdt "$@" ;;
attention) attention "$@" ;;
longest) bench "$table" --shape llama-8b --longest --seq-len 32K --steps 1 --stacks "${everyone[@]}" "$@" ;;
*)
    echo "error: no table '$table'; lora-8b, lora-8b-long, full-1b, lora-neox, attention or longest is expected." >&2
    exit 2
    ;;
esac
