#!/usr/bin/env bash
# From a bare machine to a trained detector and images of what it finds:
#   tools/quickstart.sh [OUT [KEY=VALUE ...]]
# OUT is the folder of the results; the rest are settings to override, as in
# tools/train.py --cfg-options.
# Python 3.10 to 3.12 is enough, and a C++ compiler where no compiled mmcv can be had; a
# GPU is used if there is one.
set -euo pipefail
unset CDPATH
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$tools/..
out=${1:-$root/work_dirs/quickstart}
config=$root/configs/quickstart/retinanet_convmlp_s_shapes.py
mkdir -p "$out"
out=$(cd "$out" && pwd)
data=$out/data

python=$(bash "$tools/setup.sh")
PATH="$(dirname "$python"):$PATH"
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
started=$SECONDS

echo "== 1/3 making a data set in $data"
python "$tools/data/make_shapes_dataset.py" "$data"

echo "== 2/3 training ConvMLP-S + RetinaNet, about 4 minutes on two cores"
options=(--cfg-options "data_root=$data/coco" "${@:2}")
bash "$tools/dist_train.sh" "$config" 1 --work-dir "$out/train" "${options[@]}"

echo '== 3/3 evaluating on images that it has not seen, and drawing'
checkpoint=$(cat "$out/train/last_checkpoint")
python "$tools/test.py" "$config" "$checkpoint" --work-dir "$out/test" \
    "${options[@]}" "test_evaluator.outfile_prefix=$out/predictions" 2>&1 |
    tee "$out/test.log"
# A detector that finds nothing is not given a figure.
ap50=$(grep -o 'bbox_mAP_50: [0-9.]*' "$out/test.log" | tail -n 1 || true)
ap50=${ap50:-bbox_mAP_50: 0 (nothing found)}
python "$tools/data/show_detections.py" "$out/predictions.bbox.json" \
    "$data/coco/annotations/instances_val2017.json" "$data/coco/val2017" \
    "$out/detections.png" \
    --title "ConvMLP-S + RetinaNet, generated validation set, ${ap50/bbox_mAP_50/AP50}"

echo
echo "${ap50/bbox_mAP_50/AP50} on the validation images, $((SECONDS - started)) s after set-up"
echo "images:     $out/detections.png"
echo "checkpoint: $checkpoint"
echo "logs:       $out/train"
