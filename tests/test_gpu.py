"""What a GPU might compute otherwise: tests run on the CPU, and on a GPU where there is one."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

import raftmlp
from golden.arrays import images
from helpers import CATALOGUE, GOLDEN, StoppingDigits, assert_same, relative_error, release_weights
from raftmlp.data import Digits
from raftmlp.evaluate.speed import Meter, SpeedSettings
from raftmlp.model import ops
from raftmlp.train import Trainer, TrainSettings

SMALL = dict(num_classes=10, img_size=64, embed_dims=(16, 24, 32, 48), depths=(1, 1, 2, 1), raft_size=(2, 2, 4, 2))
ONE_STAGE = dict(embed_dims=(16,), depths=(1,), patch_sizes=(4,), patch_kernels=((4, 8),), raft_size=2)


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    """The CPU, then a GPU, which multiplies float32 as such; a machine without one skips the second half."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.compiler.reset()
    return torch.device(request.param)


def small(device, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return raftmlp.RaftMLP(**{**SMALL, **kwargs}).to(device, dtype)


def noise(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def golden_model(name, device):
    model = timm.create_model(name).eval()
    model.load_state_dict(release_weights(name))
    return model.to(device)


# Numbers


@torch.no_grad()
@pytest.mark.parametrize("name", ["raftmlp_s", "raftmlp_m_ss", "raftmlp_cifar"])
def test_golden_logits(device, name):
    model, golden = golden_model(name, device), np.load(GOLDEN / f"{name}.npz")
    for height, width in CATALOGUE[name]["sizes"]:
        logits = model(torch.from_numpy(images(f"{name}/{height}x{width}", 2, height, width)).to(device))
        tolerance = 1e-5 if (height, width) == (224, 224) else 2e-5
        assert relative_error(logits.cpu(), golden[f"{height}x{width}/logits"]) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size, resizing", [((224, 224), "full"), ((200, 333), "full"), ((200, 333), "residual")])
def test_sixteen_bits_round_no_more_than_plain_operators_do(device, dtype, size, resizing):
    model = timm.create_model("raftmlp_s", resizing=resizing).eval()
    model.load_state_dict(release_weights("raftmlp_s"))
    x = noise(2, 3, *size, device=device)
    exact = model.to(device)(x)
    model.to(dtype)
    errors = [(model(x.to(dtype)).float() - exact).abs().mean() / exact.abs().max()]
    with ops.plain_operators():
        errors.append((model(x.to(dtype)).float() - exact).abs().mean() / exact.abs().max())
    assert errors[0] < 1.3 * errors[1] < 0.05


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_mixings_in_sixteen_bits_are_one_kernel_each(device, autocast, monkeypatch):
    """All of S's but the channel mixings of its last stage, which are too wide."""
    from raftmlp.model import triton as fused

    assert ops._has_triton(torch.zeros(1, device=device).device)  # which tries a kernel
    calls, mix = [], fused.mix
    monkeypatch.setattr(fused, "mix", lambda *args: calls.append(args) or mix(*args))
    model = timm.create_model("raftmlp_s").eval().to(device, torch.float32 if autocast else torch.bfloat16)
    x = noise(1, 3, 64, 64, device=device, dtype=next(model.parameters()).dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        model(x)
    assert len(calls) == 34


def test_ways_to_call_it_under_autocast(device):
    """Counted, traced and differentiated forward, for which the kernels are not."""
    model = small(device, **ONE_STAGE).eval()
    x, t = noise(2, 3, 64, 64, device=device), noise(2, 3, 64, 64, device=device)
    settings = SpeedSettings(batch_size=1, precision="amp_bfloat16")
    meter = Meter("raftmlp_digits", "eager", "inference", (32, 32), settings, device)
    assert meter.work()[0] > 4e6
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, cache_enabled=False):  # a trace needs it so
        expected = model(x)
        traced = torch.jit.trace(model, x, check_trace=False)(x)
        out, derivative = torch.func.jvp(model, (x,), (t,))
    for y in (traced, out):
        assert (y - expected).abs().max() < 0.03 * expected.abs().max()
    assert derivative.isfinite().all()


def test_gradients(device):
    model, x = small(device), noise(4, 3, 72, 100)
    exact = small("cpu", torch.float64)
    for network, images_ in ((model, x.to(device)), (exact, x.double())):
        F.cross_entropy(network(images_), torch.arange(4, device=images_.device)).backward()
    for (name, ours), wanted in zip(model.named_parameters(), exact.parameters()):
        assert (ours.grad.cpu() - wanted.grad).norm() < 1e-4 * wanted.grad.norm(), name


# Ways to call it


@pytest.mark.parametrize("device", ["cuda"], indirect=True)  # a CPU compiles in test_compilers.py
@torch.no_grad()
def test_compiled_for_inference(device):
    """In 16 bits, for which the graph has the kernels."""
    model = small(device, torch.bfloat16, **ONE_STAGE).eval()
    x = noise(4, 3, 64, 64, device=device, dtype=torch.bfloat16)
    expected, out = model(x), torch.compile(model, fullgraph=True)(x)
    assert (out - expected).abs().max() < 0.03 * expected.abs().max()


@torch.no_grad()
def test_channels_last_and_autocast(device):
    model, x = small(device).eval(), noise(3, 3, 64, 64, device=device)
    expected = model(x)
    with torch.autocast(device.type, torch.bfloat16):
        assert 0 < (model(x) - expected).abs().max() < 0.03 * expected.abs().max()
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)  # a CPU compiles in test_compilers.py
def test_compiled_for_training(device):
    model, x = small(device, **ONE_STAGE), noise(4, 3, 64, 64, device=device)
    outs = [model(x), torch.compile(model, fullgraph=True)(x)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    for wanted, found in zip(*(torch.autograd.grad(out.square().sum(), model.parameters()) for out in outs)):
        assert (found - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6


@torch.no_grad()
def test_a_graph_of_the_device_replays(device):
    """CUDA's own graphs; on a CPU the calls are simply repeated."""
    model, x = small(device, torch.bfloat16).eval(), noise(2, 3, 50, 64, device=device, dtype=torch.bfloat16)
    other = x.flip(0)
    wanted = model(other)
    if device.type == "cpu":
        x.copy_(other)
        out = model(x)
    else:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        x.copy_(other)
        graph.replay()
    assert (out - wanted).abs().max() < 0.03 * wanted.abs().max() < (wanted - wanted.flip(0)).abs().max()


@pytest.mark.parametrize("device", ["cuda"], indirect=True)  # a CPU compiles in test_export.py
@torch.no_grad()
def test_a_file_of_aotinductor(device, tmp_path):
    """Compiled and loaded in processes of their own, as one that deploys does."""
    model, x = small(device, **ONE_STAGE).eval(), noise(2, 3, 64, 64, device=device)
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((x, model(x)), tmp_path / "example.pt")
    compile_ = "torch._inductor.aoti_compile_and_package(torch.export.load('model.pt2'), package_path='aoti.pt2')"
    load = """
x, expected = torch.load("example.pt")
torch.testing.assert_close(torch._inductor.aoti_load_package("aoti.pt2")(x), expected, rtol=1e-4, atol=1e-4)"""
    for code in (compile_, load):
        done = subprocess.run(
            [sys.executable, "-c", f"import torch\n{code}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]


# Runs


def make_trainer(folder, device, data, **settings):
    torch.manual_seed(0)
    model = timm.create_model("raftmlp_digits", embed_dims=(8,) * 4, depths=(1,) * 4, drop_path_rate=0.2)
    given = dict(epochs=2, warmup_epochs=0, batch_size=48, workers=0, device=device.type, output=str(folder))
    settings = TrainSettings(**given, mixup=0.8, cutmix=1.0, reprob=0.5, model_ema=True, **settings)
    return Trainer(settings, model, data, Subset(Digits("validation"), range(40)))


def test_training_with_a_scaler(device, tmp_path):
    trainer = make_trainer(tmp_path, device, Subset(Digits("train"), range(192)), amp=True, amp_dtype="float16")
    trainer.fit()
    assert trainer.train_step.scaler.state_dict()["scale"] > 0
    assert all(np.isfinite(row["train_loss"]) for row in trainer.state.log)


def test_a_run_resumes_to_the_same_bits(device, tmp_path):
    data = Subset(StoppingDigits("train"), range(192))
    torch.use_deterministic_algorithms(True)
    try:
        whole = make_trainer(tmp_path / "whole", device, data)
        whole.fit()
        StoppingDigits.stop_at = int(whole.loader.batches.images_of(1, 1)[0])
        assert make_trainer(tmp_path / "parts", device, data).fit() is None
        parts = make_trainer(tmp_path / "parts", device, data)
        parts.fit(resume="auto")
    finally:
        torch.use_deterministic_algorithms(False)
    for key, wanted in whole.train_step.state_dict().items():
        assert_same(parts.train_step.state_dict()[key], wanted, key)
