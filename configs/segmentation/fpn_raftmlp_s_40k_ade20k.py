# Semantic FPN with RaftMLP-S, ADE20K at 512x512, 40,000 iterations: the paper's experiment.
#   torchrun --nproc-per-node 4 tools/train_mm.py configs/segmentation/fpn_raftmlp_s_40k_ade20k.py \
#       --data-dir ade/ADEChallengeData2016
# It starts from pretrained weights, raftmlp_s.TAG.safetensors in weights/, or another file with
#   --cfg-options model.backbone.init_cfg.checkpoint=FILE
# Hardware: 4 GPUs, 4 images each. Expected: not run.
_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/schedules/schedule_40k.py",
    "mmseg::_base_/default_runtime.py",
]
custom_imports = dict(imports=["raftmlp.mm"])

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="RaftMLP",
        arch="raftmlp_s",
        first_map="embed",  # as in the release
        init_cfg=dict(type="Pretrained", checkpoint="raftmlp_s"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
    decode_head=dict(num_classes=150),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=2e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=16)
