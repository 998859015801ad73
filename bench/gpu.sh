#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, tests, benchmarks in order of importance, memory checkers.
# A part that fails, or that the time is over for, does not stop the later ones; the exit code tells whether all
# went well. Few files are left in $OUT, up to date at any time:
#   summary.txt     how each part ended, and its last line
#   log.txt         what each part printed
#   rows.jsonl      a line for each benchmark
#   results.json    the same as bench/results holds them
#   metrics_*.jsonl every step of three runs: the demo's, ViT-B's with the largest batch and with one of 128
#   ops.txt         time per operation in five recorded steps of ViT-B
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_out}
LIMIT_S=${LIMIT_S:-530}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

part() {  # part NAME SECONDS COMMAND...: run it for at most so long, keep its output, note how it ended
  local name=$1 seconds=$2 left=$((LIMIT_S - SECONDS)) started=$SECONDS
  shift 2
  if [ $left -lt 5 ]; then
    echo "$name: left out, the $LIMIT_S s are over" | tee -a "$OUT/summary.txt"
    failed=1
    return
  fi
  printf '\n===== %s: %s\n' "$name" "$*" >>"$OUT/log.txt"
  local before
  before=$(wc -c <"$OUT/log.txt")
  # Interrupted rather than ended, pytest tells what failed.
  timeout -s INT -k 15 $((seconds < left ? seconds : left)) "$@" >>"$OUT/log.txt" 2>&1
  local code=$? said
  said=$(tail -c "+$((before + 1))" "$OUT/log.txt")
  echo "$name: exit $code after $((SECONDS - started)) s; $(tail -n 1 <<<"$said" | cut -c 1-160)" |
    tee -a "$OUT/summary.txt"
  if [ $code -ne 0 ]; then tail -n 20 <<<"$said"; failed=1; fi
}

tests() {  # tests NAME SECONDS ARGUMENT...: of pytest, several files at a time where it can
  local name=$1 seconds=$2
  shift 2
  # shellcheck disable=SC2086
  part "$name" "$seconds" "$PYTHON" -m pytest -q --continue-on-collection-errors $at_once "$@"
}

benchmarks() {  # benchmarks NAME SECONDS WHICH FILE...: of those for a GPU
  local name=$1 seconds=$2 which=$3
  shift 3
  part "$name" "$seconds" env "BENCH_ROWS=$OUT/rows.jsonl" "$PYTHON" -m pytest -k "(gpu or cuda) and $which" \
    --benchmark-only -q --continue-on-collection-errors "${@/%/.py}"
  if saved=$("$PYTHON" bench/results.py save "$OUT/rows.jsonl" 2>>"$OUT/log.txt"); then
    cp "$saved" "$OUT/results.json"
  fi
}

train() {  # train NAME SECONDS OPTION...
  local name=$1 seconds=$2
  shift 2
  part "train $name" "$seconds" "$PYTHON" -m pera_fast.train --device cuda --no-report "$@" --out "$work/$name"
  cp "$work/$name/metrics.jsonl" "$OUT/metrics_$name.jsonl" 2>>"$OUT/log.txt"
}

for file in summary.txt log.txt rows.jsonl; do : >"$OUT/$file"; done
nvidia-smi >>"$OUT/log.txt" 2>&1
export PERA_FAST_REQUIRE_CUDA=1
# xformers' kernels are built for CUDA 12, whose runtime a package brings (nvidia-cuda-runtime-cu12).
runtime=$("$PYTHON" -c "import glob, sys
print(*(found for path in sys.path for found in glob.glob(path + '/nvidia/cuda_runtime/lib')), sep=':')")
export LD_LIBRARY_PATH=$runtime${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True  # as in training, for peers too
part imports 20 "$PYTHON" -c "import dacite, rasterio, tyro"
part build 120 "$PYTHON" -m pip install --no-deps --no-build-isolation -e .
part loads 30 "$PYTHON" -c "import sys; from pera_fast.ops import _library
sys.exit(_library.why_no_cuda() or _library.why_no_triton())"
part info 30 "$PYTHON" -m pera_fast.info
at_once=$("$PYTHON" -c "import xdist" 2>>"$OUT/log.txt" && echo "-n 8 --dist worksteal")
tests ops 120 -k "(cuda or gpu or triton) and not compile and not interpreter" tests/test_disjoint_masks.py \
  tests/test_crop_patches.py tests/test_adamw_ema.py tests/test_ema_update.py tests/test_grad_norm.py \
  tests/test_devices.py tests/test_patch_embed.py tests/test_koleo.py tests/test_residual_norm.py \
  tests/test_distill_loss.py tests/test_packed_attention.py
tests engine 60 -k "cuda or gpu" tests/test_engine.py tests/test_batch.py tests/test_model.py tests/test_optim.py \
  tests/test_loader.py tests/test_distributed.py
tests graph 60 -k "cuda or gpu" tests/test_graph.py  # apart: a failed recording may leave traces
steps=bench/bench_step
benchmarks "step, eager" 90 "vit_b and not compile and not Pillow" $steps
benchmarks "step, Pillow" 60 "vit_b and Pillow" $steps
benchmarks "largest batch" 60 largest $steps
train demo 40 --max-steps 50 --log-every 1
endless=(--data pera_fast/demo --epochs 1000000 --log-every 1)
train vit_b_128 50 --preset vit_b "${endless[@]}" --batch-size 128 --max-steps 30 --profile 5
cp "$work/vit_b_128/profile/ops.txt" "$OUT/" 2>>"$OUT/log.txt"
train vit_b_auto 90 --preset vit_b "${endless[@]}" --max-steps 16
sizes="not compile and not Flex and not vit_s"
benchmarks kernels 100 "$sizes" bench/bench_vit bench/bench_packed_attention bench/bench_distill_loss \
  bench/bench_adamw_ema bench/bench_residual_norm bench/bench_crop_patches bench/bench_ema_update bench/bench_grad_norm \
  bench/bench_koleo bench/bench_patch_embed bench/bench_disjoint_masks
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
for tool in memcheck racecheck; do
  # Without torch's cache every tensor has an allocation, and bounds, of its own.
  part $tool 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer:-compute-sanitizer}" --tool $tool --error-exitcode 1 \
    "$PYTHON" -m pytest -q -x -k "cuda and not captured" tests/test_adamw_ema.py tests/test_ema_update.py \
    tests/test_grad_norm.py tests/test_disjoint_masks.py tests/test_crop_patches.py
done
benchmarks "step, torch.compile" 120 "vit_b and compile" $steps
# What is left of the time: peers that take minutes to compile, smaller models, every shape.
tests shapes 60 -k "cuda or gpu or triton" tests/test_shapes.py
benchmarks "vit_s" 60 "vit_s and not compile" $steps bench/bench_vit
benchmarks "compiled peers" 240 "(compile or Flex)" bench/bench_vit bench/bench_packed_attention \
  bench/bench_distill_loss bench/bench_residual_norm
"$PYTHON" bench/results.py show "$OUT/results.json" 2>>"$OUT/log.txt"
cat "$OUT/summary.txt"
exit $failed
