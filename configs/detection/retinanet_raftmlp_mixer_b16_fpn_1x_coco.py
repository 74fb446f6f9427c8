# RetinaNet with the MLP-Mixer baseline, FPN, COCO 1x: the paper's experiment.
#   torchrun --nproc-per-node 8 tools/train_mm.py configs/detection/retinanet_raftmlp_mixer_b16_fpn_1x_coco.py \
#       --data-dir coco
# It starts from pretrained weights, raftmlp_mixer_b16.TAG.safetensors in weights/, or another file with
#   --cfg-options model.backbone.init_cfg.checkpoint=FILE
# Hardware: 8 GPUs, 2 images each. Expected: not run.
# All four maps have stride 16; the sizes of the anchors are those of the other configs.
_base_ = "retinanet_raftmlp_s_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="raftmlp_mixer_b16", init_cfg=dict(checkpoint="raftmlp_mixer_b16")),
    neck=dict(in_channels=[768, 768, 768, 768]),
    bbox_head=dict(anchor_generator=dict(strides=[16, 16, 16, 32, 64], base_sizes=[8, 16, 32, 64, 128])),
)
