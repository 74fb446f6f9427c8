"""What other libraries do to layers: offloading, adapters, pruning, sharding, quantized weights, hooks that count."""

import copy

import accelerate
import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.nn.utils import parametrizations, prune, spectral_norm
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

import raftmlp  # noqa: F401

SIZES = [(32, 32), (40, 28)]


def small_model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("raftmlp_digits", **{"embed_dims": (16, 24, 32, 32), **kwargs}).eval()


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return [torch.randn(2, 3, *size) for size in SIZES]


def assert_same_logits(actual, model, images):
    with torch.no_grad():
        for x in images:
            torch.testing.assert_close(actual(x), model(x), rtol=1e-5, atol=1e-5)


def convs(model):
    return [conv for stage in model.stages for conv in stage.embed.convs]


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
def test_offloaded_weights(offload, model, images, tmp_path):
    folder = dict(offload_dir=tmp_path) if offload is accelerate.disk_offload else {}
    offloaded = offload(copy.deepcopy(model), execution_device="cpu", **folder)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert_same_logits(offloaded, model, images)


def test_a_dispatched_checkpoint(model, images, tmp_path):
    file = str(tmp_path / "model.safetensors")
    safetensors.torch.save_file(model.state_dict(), file, {"format": "pt"})
    with accelerate.init_empty_weights():
        empty = small_model()
    places = {name: "disk" if name == "stages" else "cpu" for name, _ in empty.named_children()}
    dispatched = accelerate.load_checkpoint_and_dispatch(
        empty, file, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert_same_logits(dispatched, model, images)


def test_every_adapter_is_trained_before_it_is_merged(model, images):
    config = LoraConfig(target_modules=r".*(fc1|fc2|convs\.\d+|head)", r=2, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config)
    adapted(images[0]).square().sum().backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(gradients) > 80 and all(g is not None and g.abs().max() > 0 for g in gradients)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert (merged(images[0]) - model(images[0])).abs().max() > 0.1
    assert_same_logits(adapted, merged, images)


@pytest.mark.parametrize("change", [
    lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    spectral_norm,
    parametrizations.spectral_norm,
])  # fmt: skip
def test_reparametrized_convolutions_are_trained(change, images):
    model = small_model().train()
    for conv in convs(model):
        change(conv)
    for _ in range(3):
        model(images[0]).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for conv in convs(model) for parameter in conv.parameters())


@pytest.mark.parametrize("kind", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig])
@pytest.mark.parametrize("token_mixing", ["raft", "plain"])
def test_quantized_weights(kind, token_mixing, images):
    model = small_model(token_mixing=token_mixing, img_size=64)  # no layer of one input, which torchao cannot take
    quantized = copy.deepcopy(model)
    quantize_(quantized, kind())
    with torch.no_grad():
        for x in images:
            assert 0 < (quantized(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()


def test_every_layer_is_called_where_hooks_watch(images):
    """Tools that count operations by hooks see the convolutions, the norms and the linears."""
    model, seen = small_model(), []
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.LayerNorm | nn.Linear)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, args, output, name=name: seen.append(name))
    model(images[0])
    assert sorted(seen) == sorted(layers)


def _shard(rank, folder, state, images, expected):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)

    def by_size(module, recurse, nonwrapped_numel):
        return size_based_auto_wrap_policy(module, recurse, nonwrapped_numel, min_num_params=500)

    whole, parts = small_model(), small_model()
    for model in (whole, parts):
        model.load_state_dict(state)
    for layer in [*convs(parts), *(m for m in parts.modules() if isinstance(m, nn.Linear)), parts]:
        fully_shard(layer)
    for model in (FullyShardedDataParallel(whole, auto_wrap_policy=by_size, device_id=torch.device("cpu")), parts):
        logits = model(images)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        logits.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.numel())
    dist.destroy_process_group()


def test_fsdp_on_two_processes(model, images, tmp_path):
    """FSDP wraps modules by their size; FSDP2's fully_shard is given every convolution and every Linear."""
    arguments = (str(tmp_path), model.state_dict(), images[0], model(images[0]).detach())
    torch.multiprocessing.spawn(_shard, arguments, nprocs=2)
