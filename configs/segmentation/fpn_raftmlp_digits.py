# A small Semantic FPN on scenes of handwritten digits: `make demo-segmentation`.
#   raftmlp scenes runs/scenes --train 4000 --val 200
#   raftmlp train-mm segmentation/fpn_raftmlp_digits
#   raftmlp eval-mm segmentation/fpn_raftmlp_digits runs/fpn_raftmlp_digits
# Hardware: one CPU core (AVX2, 2 GHz), 20 minutes with other work beside it. Expected on the 200 held-out scenes:
# mean IoU 76.03 %.
_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/default_runtime.py",
]
custom_imports = dict(imports=["raftmlp.mm"])

scale = (128, 128)  # of the scenes, four times the size of the backbone's trained grid
channels = 64
model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], size=scale),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="RaftMLP",
        arch="raftmlp_digits",
        resizing="residual",
        out_norm=True,
        init_cfg=dict(type="Pretrained", checkpoint="raftmlp_digits.sklearn"),
    ),
    neck=dict(in_channels=[32, 64, 128, 128], out_channels=channels, norm_cfg=dict(type="BN")),
    decode_head=dict(
        in_channels=[channels] * 4,
        channels=channels,
        num_classes=11,
        dropout_ratio=0,
        loss_decode=[
            dict(type="CrossEntropyLoss"),
            # nine tenths of the pixels are background, class 0: this one ignores them
            dict(type="DiceLoss", use_sigmoid=False, ignore_index=0),
        ],
    ),
)

data_root = "runs/scenes"
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=dict(
        classes=("background", *"0123456789"),
        palette=[
            [0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48], [145, 30, 180],
            [70, 240, 240], [240, 50, 230], [210, 245, 60], [250, 190, 212],
        ],
    ),
)  # fmt: skip
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="Resize", scale=scale, keep_ratio=True),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=scale, keep_ratio=True),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

iterations = 1500
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=750)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="raftmlp.mm.Muon", lr=4e-3, weight_decay=0.05, nesterov=True),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=iterations, by_epoch=False),
]
randomness = dict(seed=0)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=750, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
visualizer = dict(alpha=0.6)
