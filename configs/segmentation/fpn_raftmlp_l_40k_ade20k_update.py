# Semantic FPN with RaftMLP-L, ADE20K at 512x512, 40,000 iterations: the paper's experiment with resizing="residual",
# which keeps the detail of maps that are larger than the trained grid, and a LayerNorm on every map.
#   torchrun --nproc-per-node 4 tools/train_mm.py configs/segmentation/fpn_raftmlp_l_40k_ade20k_update.py \
#       --data-dir ade/ADEChallengeData2016
# It starts from pretrained weights, raftmlp_l.TAG.safetensors in weights/, or another file with
#   --cfg-options model.backbone.init_cfg.checkpoint=FILE
# Hardware: 4 GPUs, 4 images each. Expected: not run.
_base_ = "fpn_raftmlp_l_40k_ade20k.py"

model = dict(backbone=dict(resizing="residual", first_map="stage", out_norm=True))
