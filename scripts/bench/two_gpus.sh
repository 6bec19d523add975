#!/usr/bin/env bash
# The measurements of docs/results/benchmarks.md on several GPUs of one host:
#     bash scripts/bench/two_gpus.sh TABLE [options of hf-fpdt bench]
# TABLE: sp peers full longest. Later options win, e.g. --gpus 4 --seq-len 512K, or --gpus 1 for the row to compare with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out="${OUT:-out/bench}"
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

bench() { # TABLE OPTION...
    local table="$1"
    shift
    python -m hf_fpdt.commands.main bench --gpus 2 "$@" --csv "$out/$table-2.csv" --json "$out/$table-2.jsonl"
}

table="${1:?a table is expected: sp peers full longest}"
shift
case "$table" in
sp) bench "$table" --shape llama-8b --seq-len 128K 256K --steps 2 --stacks fpdt fpdt-host "$@" ;;
peers) bench "$table" --shape llama-8b --seq-len 64K 128K --steps 2 --stacks fpdt ring alst-sp "$@" ;;
longest) bench "$table" --shape llama-8b --longest --seq-len 128K --steps 1 --stacks ring alst-sp "$@" ;;
full) bench "$table" --shape llama-1b --full --seq-len 128K 256K --steps 2 --stacks fpdt ring "$@" ;;
*)
    echo "error: no table '$table'; sp, peers, full or longest is expected." >&2
    exit 2
    ;;
esac
