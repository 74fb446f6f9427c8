# A small Mask R-CNN with FPN on scenes of handwritten digits: `make demo-detection`.
#   raftmlp scenes runs/scenes --train 4000 --val 200
#   raftmlp train-mm detection/mask_rcnn_raftmlp_digits
#   raftmlp eval-mm detection/mask_rcnn_raftmlp_digits runs/mask_rcnn_raftmlp_digits
# Hardware: one CPU core (AVX2, 2 GHz), 29 minutes with other work beside it. Expected on the 200 held-out scenes:
# boxes AP50 0.970, AP 0.720; masks AP50 0.963, AP 0.717.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["raftmlp.mm"])

channels = 64
model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        _delete_=True,
        type="RaftMLP",
        arch="raftmlp_digits",
        resizing="residual",
        out_norm=True,
        init_cfg=dict(type="Pretrained", checkpoint="raftmlp_digits.sklearn"),
    ),
    neck=dict(in_channels=[32, 64, 128, 128], out_channels=channels, num_outs=4),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)

data_root = "runs/scenes/"
dataset = dict(
    type="CocoDataset",
    data_root=data_root,
    metainfo=dict(classes=tuple("0123456789")),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_training.json",
        data_prefix=dict(img="images/training/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="Resize", scale=(128, 128), keep_ratio=True),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackDetInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_validation.json",
        data_prefix=dict(img="images/validation/"),
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(128, 128), keep_ratio=True),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(
                type="PackDetInputs",
                meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
            ),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric",
    ann_file=data_root + "annotations/instances_validation.json",
    metric=["bbox", "segm"],
)
test_evaluator = val_evaluator

epochs = 2
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="raftmlp.mm.Muon", lr=4e-3, weight_decay=0.05, nesterov=True),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=0, end=epochs, by_epoch=True, convert_to_iter_based=True),
]
randomness = dict(seed=0)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
visualizer = dict(line_width=1, alpha=0.5)
