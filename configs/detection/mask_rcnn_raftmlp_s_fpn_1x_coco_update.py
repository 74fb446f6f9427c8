# Mask R-CNN with RaftMLP-S, FPN, COCO 1x: the paper's experiment with resizing="residual",
# which keeps the detail of maps that are larger than the trained grid, and a LayerNorm on every map.
#   torchrun --nproc-per-node 8 tools/train_mm.py configs/detection/mask_rcnn_raftmlp_s_fpn_1x_coco_update.py \
#       --data-dir coco
# It starts from pretrained weights, raftmlp_s.TAG.safetensors in weights/, or another file with
#   --cfg-options model.backbone.init_cfg.checkpoint=FILE
# Hardware: 8 GPUs, 2 images each. Expected: not run.
_base_ = "mask_rcnn_raftmlp_s_fpn_1x_coco.py"

model = dict(backbone=dict(resizing="residual", first_map="stage", out_norm=True))
