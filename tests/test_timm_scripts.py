"""What timm's train.py and validate.py call, with our models; the scripts themselves are not in timm's package."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import timm
import torch
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver, dispatch_clip_grad

from helpers import ROOT, make_image_folder, same_weights

TINY = dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))
# what train.py gives every model where its options are left out
OPEN = dict.fromkeys(("drop_path_rate", "drop_block_rate", "global_pool", "bn_momentum", "bn_eps"))
LEFT_OUT = dict(OPEN, drop_rate=0.0, scriptable=False, checkpoint_path="")
CPU = torch.device("cpu")


def test_a_script_run_with_the_models(tmp_path):
    """An import is all that --device-modules does, and all that a script lacks which has no such option."""
    script = tmp_path / "validate.py"
    script.write_text("import sys, timm\nprint(timm.is_model('raftmlp_digits'), __name__, sys.argv[1:])\n")
    for imports, known in (("import runpy", False), ("import raftmlp, runpy", True)):
        line = f"{imports}; runpy.run_path({str(script)!r}, run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", line, "--model", "x"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        assert done.stdout == f"{known} __main__ ['--model', 'x']\n"


@pytest.mark.parametrize(
    "mixed, amp, scripted, kwargs",
    [
        (False, False, False, {}),
        (True, True, False, dict(resizing="residual", drop_path_rate=0.1)),
        (False, False, True, {}),
    ],
)
def test_training_at_several_sizes(tmp_path, mixed, amp, scripted, kwargs):
    make_image_folder(tmp_path / "data", train=8, val=2)
    torch.manual_seed(0)
    model = timm.create_model("raftmlp_digits", num_classes=2, **{**LEFT_OUT, **TINY, **kwargs})
    if not scripted:
        model.set_grad_checkpointing(enable=True)
    config = resolve_data_config(dict(img_size=None, input_size=None), model=model)
    assert config["input_size"] == (3, 32, 32)
    model = torch.jit.script(model) if scripted else model.to(memory_format=torch.channels_last)

    common = dict(mean=config["mean"], std=config["std"], device=CPU, use_prefetcher=True)
    mixing = dict(mixup_alpha=0.2, num_classes=2, label_smoothing=0.1)
    train, val = (create_dataset("", tmp_path / "data", split=split) for split in ("train", "val"))
    loader = create_loader(
        train, config["input_size"], batch_size=4, is_training=True, input_size_choices=[24, 32, 40],
        batch_size_choices=[4, 4, 2], num_batches=8, collate_fn=FastCollateMixup(**mixing) if mixed else None, **common,
    )  # fmt: skip
    task = ClassificationTask(
        model, device=CPU, criterion_kwargs=dict(smoothing=0.1, soft_targets=mixed), verbose=False
    )
    optimizer = create_optimizer_v2(
        task.get_trainable_module(), "adamw", lr=1e-3, layer_decay=None if scripted else 0.7
    )
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2, updates_per_epoch=len(loader))
    task.setup_ema(decay=0.9)
    saver = CheckpointSaver(
        model=task.get_trainable_module(),
        optimizer=optimizer,
        checkpoint_dir=tmp_path,
        recovery_dir=tmp_path,
        task=task,
    )

    sizes, before = set(), {name: value.detach().clone() for name, value in model.named_parameters()}
    loader.batch_sampler.set_epoch(0)
    task.get_trainable_module().train()
    for update, (images, labels) in enumerate(loader):
        sizes.add(images.shape[-1])
        with torch.autocast("cpu", torch.bfloat16) if amp else nullcontext():
            loss = task(images, labels)["loss"]
        loss.backward()
        dispatch_clip_grad(task.get_clip_parameters(exclude_head=not scripted), 0.1, "norm" if scripted else "agc")
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=update)
        scheduler.step_update(update + 1)
    assert len(sizes) > 1
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())

    evaluator = task.create_evaluator(max_samples=len(val))
    with torch.inference_mode():
        for images, labels in create_loader(val, config["input_size"], batch_size=4, **common):
            evaluator.update(task.get_eval_model(ema=True).eval()(images), labels)
    assert 0 <= evaluator.compute()["top1"] <= 100
    saver.save_checkpoint(0, metric=1.0)

    other = timm.create_model("raftmlp_digits", num_classes=2, **{**LEFT_OUT, **TINY, **kwargs})
    other_task = ClassificationTask(other, device=CPU, verbose=False)
    other_optimizer = create_optimizer_v2(other, "adamw", lr=1e-3, layer_decay=None if scripted else 0.7)
    assert resume_task_checkpoint(other_task, str(tmp_path / "last.pth.tar"), other_optimizer, log_info=False) == 1
    assert same_weights(other, task.get_trainable_module())
