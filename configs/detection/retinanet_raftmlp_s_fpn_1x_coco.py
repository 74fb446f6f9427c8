# RetinaNet with RaftMLP-S, FPN, COCO 1x: the paper's experiment.
#   torchrun --nproc-per-node 8 tools/train_mm.py configs/detection/retinanet_raftmlp_s_fpn_1x_coco.py \
#       --data-dir coco
# It starts from pretrained weights, raftmlp_s.TAG.safetensors in weights/, or another file with
#   --cfg-options model.backbone.init_cfg.checkpoint=FILE
# Hardware: 8 GPUs, 2 images each. Expected: not run.
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["raftmlp.mm"])

model = dict(
    backbone=dict(
        _delete_=True,
        type="RaftMLP",
        arch="raftmlp_s",
        first_map="embed",  # as in the release
        init_cfg=dict(type="Pretrained", checkpoint="raftmlp_s"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4))
