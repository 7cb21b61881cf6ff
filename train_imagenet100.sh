#!/usr/bin/env bash
# The paper's recipe, from a folder of ImageNet to the evaluated table:
#     DATA=/path/to/imagenet ./train_imagenet100.sh
# DATA holds train/<wnid>/* and val/<wnid>/* of ImageNet-1k or of ImageNet-100. Relative folders are the caller's. The same
# command again goes on where the run stopped; with other options it is refused.
set -euo pipefail
DATA=${DATA:-}                                    # the images; needed
METHOD=${METHOD:-clever} ARCH=${ARCH:-vit_tiny} AUG=${AUG:-caug}
OUT=${OUT:-runs/in100-$METHOD-$ARCH-$AUG}         # the run: checkpoints, log, backbone.pt, eval.json
SUBSET=${SUBSET:-$OUT-images}                     # links to the 100 classes are made here, nothing is copied
EPOCHS=${EPOCHS:-200} BATCH=${BATCH:-512} SEED=${SEED:-0}
GPUS=${GPUS:-gpu}                                 # processes: a number, or gpu for one a GPU
TRAIN_OPTIONS=${TRAIN_OPTIONS:-}                  # more options of clever.py, such as "--compile --workers 16"
EVAL_OPTIONS=${EVAL_OPTIONS:-}                    # more options of eval_linear.py, such as "--quick"
PYTHON=${PYTHON:-python3}

# The 100 classes that the field uses (CMC's list).
CLASSES="
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166
n01983481 n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622
n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550 n02107142 n02108089 n02109047
n02113799 n02113978 n02114855 n02116738 n02119022 n02123045 n02138441 n02172182 n02231487 n02259212
n02326432 n02396427 n02483362 n02488291 n02701002 n02788148 n02804414 n02859443 n02869837 n02877765
n02974003 n03017168 n03032252 n03062245 n03085013 n03259280 n03379051 n03424325 n03492542 n03494278
n03530642 n03584829 n03594734 n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032
n03794056 n03837869 n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531
n04127249 n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 n04485082 n04493381
n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406 n13040303"

unset CDPATH
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() { echo "train_imagenet100.sh: $1" >&2; exit 2; }
[ -n "$DATA" ] || fail "set DATA to the folder of ImageNet that holds train/ and val/"
[ -d "$DATA/train" ] && [ -d "$DATA/val" ] || fail "DATA=$DATA has no train/ and val/; expected train/<wnid>/*"
for c in $CLASSES; do
    for split in train val; do
        [ -d "$DATA/$split/$c" ] || fail "$DATA/$split/$c is missing: is val/ sorted into classes?"
    done
done
"$PYTHON" -c "import torch, torchvision, tqdm" 2>/dev/null || fail "install what it needs: pip install -r requirements.txt"
"$PYTHON" - "$DATA" "$SUBSET" <<'INSIDE' || fail "SUBSET=$SUBSET is inside DATA=$DATA; name a folder elsewhere"
import os, sys
data, subset = (os.path.realpath(path) for path in sys.argv[1:])
sys.exit((subset + os.sep).startswith(data + os.sep))
INSIDE
[[ $GPUS =~ ^([1-9][0-9]*|gpu)$ ]] || fail "GPUS=$GPUS is neither a number of processes nor gpu"
[[ " $TRAIN_OPTIONS " != *" --"@(out|data|resume)@(=| )* ]] || fail "set DATA and OUT; the same command resumes by itself"
# shellcheck disable=SC2206
train=(--data "$SUBSET" --method "$METHOD" --arch "$ARCH" --aug "$AUG"
       --epochs "$EPOCHS" --batch "$BATCH" --seed "$SEED" $TRAIN_OPTIONS)
check() {  # the options of a script, before hours of training
    PYTHONPATH=$HERE "$PYTHON" - "$@" <<'INSIDE' || exit 2
import importlib, sys, clever
parse = importlib.import_module(sys.argv[1]).parse
sys.exit(clever.guarded(sys.argv[1], lambda: parse(sys.argv[2:])))
INSIDE
}
check clever "${train[@]}"
# shellcheck disable=SC2086
check eval_linear RUN $EVAL_OPTIONS
if [ "$GPUS" = gpu ]; then
    "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
        fail "no GPU that torch can use; set GPUS=1 for a process on the CPU"
fi

for c in $CLASSES; do
    for split in train val; do
        [ -L "$SUBSET/$split/$c" ] || [ ! -e "$SUBSET/$split/$c" ] || fail "SUBSET=$SUBSET holds folders, not links; name another"
        mkdir -p "$SUBSET/$split" && ln -sfn "$(cd "$DATA/$split/$c" && pwd)" "$SUBSET/$split/$c"
    done
done
run() {
    local script=$1
    shift
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" "$HERE/$script" "$@"
}
RESUME=
[ ! -e "$OUT/checkpoint.pt" ] || RESUME=--resume
run clever.py --out "$OUT" "${train[@]}" $RESUME
# shellcheck disable=SC2086
run eval_linear.py "$OUT" $EVAL_OPTIONS
