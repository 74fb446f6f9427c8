"""The networks as encoders of segmentation-models-pytorch."""

import pytest
import segmentation_models_pytorch as smp
import torch

TINY = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), img_size=32)
STRIDE_16 = dict(patch_sizes=(4, 2, 2, 1), patch_kernels=((4, 8), (2, 4), (2, 4), (1,)))
TWO_STAGES = dict(embed_dims=(8, 16), depths=(1, 1), img_size=32, encoder_depth=2, decoder_channels=(16, 8))


@pytest.mark.filterwarnings("ignore:Encoder does not have prefix tokens")
@pytest.mark.parametrize(
    "architecture, encoder, kwargs, size",
    [
        ("Unet", "raftmlp_digits", TINY, 64),
        ("Unet", "raftmlp_digits", TINY | dict(encoder_depth=3, decoder_channels=(16, 8, 8), in_channels=1), 72),
        ("Unet", "raftmlp_digits", TINY | dict(resizing="residual"), 64),
        ("Unet", "raftmlp_cifar", TWO_STAGES, 32),
        ("FPN", "raftmlp_digits", TINY, 64),
        ("UPerNet", "raftmlp_digits", TINY, 64),
        ("DPT", "raftmlp_12_r2", dict(embed_dims=(8,), depths=(4,), img_size=32), 64),
        ("DeepLabV3Plus", "raftmlp_digits", TINY | STRIDE_16, 64),
        ("PAN", "raftmlp_digits", TINY | dict(encoder_output_stride=32), 256),
    ],
)
def test_architectures(architecture, encoder, kwargs, size):
    torch.manual_seed(0)
    model = getattr(smp, architecture)(f"tu-{encoder}", encoder_weights=None, classes=2, **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    (embedding,) = (p for name, p in model.named_parameters() if name.endswith("stages.0.embed.bias"))
    before = embedding.detach().clone()
    masks = model(torch.randn(2, kwargs.get("in_channels", 3), size, size))
    assert masks.shape == (2, 2, size, size)
    masks.square().mean().backward()
    optimizer.step()
    assert not torch.equal(embedding, before)


@pytest.mark.parametrize("architecture, stride", [("PAN", 16), ("DeepLabV3Plus", 16), ("DeepLabV3", 8)])
def test_another_stride_is_refused_in_words(architecture, stride):
    words = f"output_stride {stride} must be 32, the product of patch_sizes .* give other patch_sizes"
    with pytest.raises(ValueError, match=words):
        getattr(smp, architecture)("tu-raftmlp_digits", encoder_weights=None, **TINY)


def test_shipped_weights_and_a_round_trip(tmp_path):
    model = smp.Unet("tu-raftmlp_digits", encoder_weights=True, classes=2).eval()
    assert model.encoder.model.pretrained_cfg["tag"] == "sklearn"
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(smp.from_pretrained(tmp_path).eval()(images), model(images))
