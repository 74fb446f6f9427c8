# Semantic FPN with the MLP-Mixer baseline, ADE20K at 512x512, 40,000 iterations: the paper's experiment.
#   torchrun --nproc-per-node 4 tools/train_mm.py configs/segmentation/fpn_raftmlp_mixer_b16_40k_ade20k.py \
#       --data-dir ade/ADEChallengeData2016
# It starts from pretrained weights, raftmlp_mixer_b16.TAG.safetensors in weights/, or another file with
#   --cfg-options model.backbone.init_cfg.checkpoint=FILE
# Hardware: 4 GPUs, 4 images each. Expected: not run.
# All four maps have stride 16.
_base_ = "fpn_raftmlp_s_40k_ade20k.py"

model = dict(
    backbone=dict(arch="raftmlp_mixer_b16", init_cfg=dict(checkpoint="raftmlp_mixer_b16")),
    neck=dict(in_channels=[768, 768, 768, 768]),
    decode_head=dict(feature_strides=[16, 16, 16, 16]),
)
