#!/usr/bin/env bash
# From nothing to a model that reads sixteen times further: about seven minutes on two CPU cores, nothing downloaded but
# the packages. Trains a tokenizer and a small Llama on Python's own standard library at 512 tokens, then extends it to
# 8,192 tokens (YaRN, LoRA) with hf_fpdt, and draws the loss at each position of held-out packages, before and after.
#
#     bash scripts/quickstart.sh [--tiny] [--output FOLDER]
#
# --tiny (or QUICKSTART_TINY=1) tries the whole flow in less than a minute on a model too small to learn anything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tiny="${QUICKSTART_TINY:-}" output=out/quickstart
while [ $# -gt 0 ]; do
    case "$1" in
        --tiny) tiny=1 ;;
        --output) output="${2:?--output needs a folder}" && shift ;;
        *) echo "quickstart: unknown option '$1'; allowed: --tiny, --output FOLDER" >&2 && exit 2 ;;
    esac
    shift
done

source scripts/env.sh dev
export HF_HUB_OFFLINE=1
began=$SECONDS

echo "[quickstart] 1 of 2: a tokenizer and a small Llama, trained on the standard library at 512 tokens"
python scripts/quickstart_model.py --output "$output" ${tiny:+--tiny}
model_seconds=$((SECONDS - began))

length=8K size=(--chunk_tokens 2K --max_steps 32 --warmup_steps 2 --eval_windows 24)
if [ -n "$tiny" ]; then length=1K size=(--chunk_tokens 256 --max_steps 2 --warmup_steps 0 --eval_windows 2); fi
echo "[quickstart] 2 of 2: extend it to $length tokens in chunks, with attn_implementation=\"fpdt\""
rm -rf "$output"/extended/checkpoint-*  # of a run before, which extended another model
# Two processes on the CPU share every sequence, as two GPUs would. Those that spin for the same core slow each other down
# tenfold; waiting threads sleep in place of that.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --main_process_port 0 -m hf_fpdt.commands.finetune --use_cpu --sp_size 2 --model "$output/small-llama-512" \
    --data "$output/data/train.jsonl" --eval_data "$output/data/held_out.jsonl" --rope_scaling yarn --long_documents cut \
    --lora_r 16 --lora_alpha 32 --learning_rate 3e-3 --max_length "$length" "${size[@]}" \
    --output_dir "$output/extended" --overwrite

echo
echo "[quickstart] base model $model_seconds s, extension and evaluation $((SECONDS - began - model_seconds)) s"
echo "[quickstart] figure: $output/extended/loss_by_position.png"
echo "[quickstart] model card: $output/extended/README.md"
