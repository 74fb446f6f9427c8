# Mask R-CNN with RaftMLP-M, FPN, COCO: a schedule of today, 36 epochs at many scales, with drop path.
#   torchrun --nproc-per-node 8 tools/train_mm.py configs/detection/mask_rcnn_raftmlp_m_fpn_ms_3x_coco.py \
#       --data-dir coco
# It starts from pretrained weights, raftmlp_m.TAG.safetensors in weights/, or another file with
#   --cfg-options model.backbone.init_cfg.checkpoint=FILE
# Hardware: 8 GPUs, 2 images each. Expected: not run.
# The first map is the first stage's real output, and every map gets a LayerNorm.
_base_ = "mask_rcnn_raftmlp_m_fpn_1x_coco.py"

model = dict(backbone=dict(first_map="stage", out_norm=True, drop_path_rate=0.2))
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="RandomChoiceResize", scales=[(1333, side) for side in range(480, 801, 32)], keep_ratio=True),
            dict(type="PackDetInputs"),
        ]
    )
)
train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
