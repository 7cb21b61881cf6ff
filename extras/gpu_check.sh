#!/usr/bin/env bash
# Check this project on a GPU, in about eleven minutes: bash extras/gpu_check.sh
# Prints a page of figures, the most important checks first. The exit code is 0 if all is as
# promised, else 1. Without a GPU, small sizes only test the script itself.
set -uo pipefail
cd "$(dirname "$(realpath "$0")")/.." || exit 1

work=$(mktemp -d)
log=$(mktemp)
failed=""
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 STEPS=6 TORCHINDUCTOR_CACHE_DIR=$work/compiled

check() { # NAME LINES COMMAND: run it and print the last lines of its output, its figures
    local name=$1 lines=$2 start=$SECONDS result=ok
    shift 2
    if ! "$@" >"$work/figures" 2>>"$log"; then
        result=FAILED
        failed="$failed $name"
    fi
    cat "$work/figures" >>"$log"
    echo
    echo "$name: $result ($((SECONDS - start)) s)"
    tail -n "$lines" "$work/figures" | sed "s/^/    /"
}

data=(--data "$work/photos")
if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    photos=4096
    demo=(--epochs 2)
    vit_tiny=("${data[@]}" --arch vit_tiny --batch 512)
    vmamba=("${data[@]}" --arch vmamba_tiny --batch 80)
    resnet50=("${data[@]}" --arch resnet50 --batch 384 --aug caug+)
    vit_small=("${data[@]}" --arch vit_small --batch 512)
    two=("${data[@]}" --arch resnet18 --global-size 112 --local-size 48 --out-dim 1024 --batch 128)
else
    echo "no GPU: a dry run at small sizes"
    photos=128
    demo=("${data[@]}" --recipe small --out-dim 64 --hidden-dim 64 --workers 1 --batch 16)
    demo+=(--epochs 10)
    vit_tiny=("${demo[@]}")
    vmamba=("${demo[@]}")
    resnet50=("${demo[@]}" --aug caug+)
    vit_small=("${demo[@]}")
    two=("${demo[@]}")
    export TORCHDYNAMO_DISABLE=1 # compiling takes minutes
fi

two_ranks() { # two processes, then one, with the same images
    local options=("${two[@]}" --precision fp32 --epochs 1)
    timeout 70 python -m torch.distributed.run --nproc-per-node 2 extras/gpu_check.py join \
        "${options[@]}" --out "$work/two" &&
        timeout 50 python clever.py "${options[@]}" --out "$work/one" &&
        python extras/gpu_check.py same_loss "$work/one/log.jsonl" "$work/two/log.jsonl"
}

stop_and_resume() { # a run stopped by SIGTERM, then resumed, ends with the loss of the demo
    local run=(timeout 60 python clever.py "${demo[@]}" --resume --out "$work/stopped")
    "${run[@]}" >"$work/messages" &
    until [ -s "$work/stopped/log.jsonl" ] || ! kill -0 $!; do sleep 0.1; done
    kill -TERM $!
    wait $!
    [ $? = 143 ] || return 1
    grep "stopped at step" "$work/messages" || return 1
    "${run[@]}" >"$work/messages" &&
        python extras/gpu_check.py same_loss "$work/demo/log.jsonl" "$work/stopped/log.jsonl"
}

compiled() { # the step and the views compile without a break or a fallback to eager mode
    local messages=$work/messages
    TORCH_LOGS=recompiles,graph_breaks timeout 150 \
        python extras/speed.py "${vit_tiny[@]}" --compile 2>"$messages" || return 1
    cat "$messages" >>"$log"
    echo "$(grep -c "Recompiling function" "$messages") recompilations"
    grep -E "Graph break|hit config" "$messages" && return 1
    timeout 60 python extras/gpu_check.py compiled_views
}

python extras/gpu_check.py photos "$work/photos" "$photos" || exit 1
check waits 3 timeout 120 python extras/gpu_check.py waits
check same_as_cpu 1 timeout 60 python extras/gpu_check.py same_as_cpu
check demo 9 timeout 60 python clever.py "${demo[@]}" --out "$work/demo"
check evaluation 20 timeout 60 python eval_linear.py "$work/demo" --quick --epochs 5
check fine_tuning 3 timeout 40 python eval_linear.py "$work/demo" --finetune --labels 0.1 --epochs 1
check features_on_cpu 1 env CUDA_VISIBLE_DEVICES= timeout 60 \
    python eval_linear.py "$work/demo" --features "$work/photos/val"
check visualize 1 timeout 40 python extras/visualize.py "$work/demo" "$work/photos/val/0/0.jpg"
check host 6 timeout 60 python extras/gpu_check.py host
check svdvals 3 timeout 60 python extras/gpu_check.py svdvals
check vit_tiny 5 timeout 70 python extras/speed.py "${vit_tiny[@]}"
check vmamba_tiny 5 timeout 70 python extras/speed.py "${vmamba[@]}"
check resnet50 5 timeout 70 python extras/speed.py "${resnet50[@]}"
check two_ranks 1 two_ranks
check stop_and_resume 2 stop_and_resume
check draws 3 timeout 30 python extras/gpu_check.py draws
check vit_small 5 timeout 70 python extras/speed.py "${vit_small[@]}"
check compile 8 compiled

echo
echo "all messages are in $log"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
echo "all is as promised"
