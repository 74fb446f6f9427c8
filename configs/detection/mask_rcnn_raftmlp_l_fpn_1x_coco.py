# Mask R-CNN with RaftMLP-L, FPN, COCO 1x: the paper's experiment.
#   torchrun --nproc-per-node 8 tools/train_mm.py configs/detection/mask_rcnn_raftmlp_l_fpn_1x_coco.py \
#       --data-dir coco
# It starts from pretrained weights, raftmlp_l.TAG.safetensors in weights/, or another file with
#   --cfg-options model.backbone.init_cfg.checkpoint=FILE
# Hardware: 8 GPUs, 2 images each. Expected: not run.
_base_ = "mask_rcnn_raftmlp_s_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="raftmlp_l", init_cfg=dict(checkpoint="raftmlp_l")),
    neck=dict(in_channels=[128, 192, 512, 1024]),
)
