"""What trains networks elsewhere: Lightning, layer-wise decay."""

import pytest
import pytorch_lightning as lightning
import timm
import torch
from timm.optim import create_optimizer_v2

TINY = dict(embed_dims=(8, 8, 16, 16), depths=(1, 2, 1, 1))


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("raftmlp_digits", **TINY)
        self.losses = []

    def training_step(self, batch, index):
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_lightning(tmp_path):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4))
    options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_steps=8, precision="bf16-mixed", default_root_dir=tmp_path, **options)
    classifier = Classifier()
    trainer.fit(classifier, torch.utils.data.DataLoader(data, 4))
    assert classifier.losses[-1] < classifier.losses[0]
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu", weights_only=True)
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(again.eval().model(images), classifier.eval().model(images))


def test_layer_wise_decay():
    model = timm.create_model("raftmlp_digits", **TINY)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.7)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    depths = {
        name: round(torch.tensor(scales[id(p)]).log().div(torch.tensor(0.7).log()).item())
        for name, p in model.named_parameters()
    }
    for prefix, depth in (
        ("stages.0.embed.", 6), ("stages.0.blocks.0.", 5), ("stages.1.embed.", 4), ("stages.1.blocks.0.", 4),
        ("stages.1.blocks.1.", 3), ("stages.2.", 2), ("stages.3.", 1), ("norm.", 1), ("head.", 0),
    ):  # fmt: skip
        assert {value for name, value in depths.items() if name.startswith(prefix)} == {depth}, prefix
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
