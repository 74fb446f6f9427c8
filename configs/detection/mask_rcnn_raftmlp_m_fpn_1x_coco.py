# Mask R-CNN with RaftMLP-M, FPN, COCO 1x: the paper's experiment.
#   torchrun --nproc-per-node 8 tools/train_mm.py configs/detection/mask_rcnn_raftmlp_m_fpn_1x_coco.py \
#       --data-dir coco
# It starts from pretrained weights, raftmlp_m.TAG.safetensors in weights/, or another file with
#   --cfg-options model.backbone.init_cfg.checkpoint=FILE
# Hardware: 8 GPUs, 2 images each. Expected: not run.
_base_ = "mask_rcnn_raftmlp_s_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="raftmlp_m", init_cfg=dict(checkpoint="raftmlp_m")),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
