#!/usr/bin/env bash
# What only a GPU can show, in one command:
#
#     bash bench/gpu.sh [DATA_DIR] [OUT]          CIFAR-100 is downloaded to DATA_DIR if it is not there
#     EPOCHS=50 bash bench/gpu.sh                 a shorter run, with a whole cosine of its own
#
# Every part leaves a log in OUT. A part that is done is not repeated, and an interrupted training
# goes on from its checkpoint: after a disconnect give the same command again.
set -uo pipefail
cd "$(dirname "$0")/.."
DATA=${1:-data}
OUT=${2:-results/gpu}
EPOCHS=${EPOCHS:-200}
mkdir -p "$OUT"

part() { # NAME COMMAND...: its output goes to OUT/NAME.log, too
  local name=$1
  shift
  [ -e "$OUT/$name.done" ] && return
  echo "== $name: $*"
  if "$@" 2>&1 | tee -a "$OUT/$name.log"; then
    touch "$OUT/$name.done"
  else
    echo "== $name FAILED: read $OUT/$name.log; the same command tries it again"
    return 1
  fi
}

part machine nvidia-smi

# 1. The tests, with CUDA. Sums round differently there; the tests allow for it.
part tests python -m pytest -q

# 2. Time of a step: eager, compiled, with the fused tail, with CUDA graphs.
#    sacl.py's default on one new GPU is bf16+graphs.
part step python bench/step.py --dataset cifar100 --whole --json "$OUT/step.json"
part step-512 python bench/step.py --dataset cifar100 --whole --batch-size 512 \
  --json "$OUT/step-512.json" --rows bf16,bf16+graphs,bf16+graphs+fused
part textures python bench/texture.py --data-dir "$DATA" --json "$OUT/texture.json"

# 3. The paper's run (Section 3.2) and its linear evaluation; then what the encoder goes by.
RUN="$OUT/cifar100-$EPOCHS-epochs"
part "train-$EPOCHS" python sacl.py --dataset cifar100 --data-dir "$DATA" --output-dir "$RUN" \
  --epochs "$EPOCHS" || exit 1
part "lbfgs-$EPOCHS" python eval_linear.py "$RUN" --probe lbfgs
part "linear-$EPOCHS" python eval_linear.py "$RUN"
part "linear-target-$EPOCHS" python eval_linear.py "$RUN" --encoder target
part "shifts-$EPOCHS" python bench/shifts.py "$RUN"
part "shifts-recalibrated-$EPOCHS" python bench/shifts.py "$RUN" --encoder recalibrated

# To keep: OUT/*.log, OUT/*.json, and of the run log.jsonl, config.json, linear-*.json, shifts-*.json
# and backbone.pth; checkpoint.pth only to train on.
