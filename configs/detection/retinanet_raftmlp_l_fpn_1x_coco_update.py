# RetinaNet with RaftMLP-L, FPN, COCO 1x: the paper's experiment with resizing="residual",
# which keeps the detail of maps that are larger than the trained grid, and a LayerNorm on every map.
#   torchrun --nproc-per-node 8 tools/train_mm.py configs/detection/retinanet_raftmlp_l_fpn_1x_coco_update.py \
#       --data-dir coco
# It starts from pretrained weights, raftmlp_l.TAG.safetensors in weights/, or another file with
#   --cfg-options model.backbone.init_cfg.checkpoint=FILE
# Hardware: 8 GPUs, 2 images each. Expected: not run.
_base_ = "retinanet_raftmlp_l_fpn_1x_coco.py"

# The head has no use for the first map, and its LayerNorm would not train: the neck begins with the second one.
model = dict(
    backbone=dict(resizing="residual", first_map="stage", out_norm=True, out_indices=(1, 2, 3)),
    neck=dict(in_channels=[192, 512, 1024], start_level=0),
)
