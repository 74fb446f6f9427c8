"""A folder for the Hugging Face Hub: config.json, model.safetensors, and a README.md that tells of the weights."""

import json
import shutil
import tempfile
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import nn

import cli
from raftmlp import RaftMLP
from raftmlp.checkpoint import load_checkpoint
from reports import size_name

CITATION = """@inproceedings{tatsunami2022raftmlp,
  title     = {RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?},
  author    = {Tatsunami, Yuki and Taki, Masato},
  booktitle = {Asian Conference on Computer Vision (ACCV)},
  year      = {2022}
}"""
RECIPE = (
    "epochs", "global_batch_size", "opt", "lr", "weight_decay", "sched", "warmup_epochs", "layer_decay", "smoothing",
    "drop_path", "aa", "mixup", "cutmix", "reprob", "model_ema", "img_size", "seed",
)  # fmt: skip


def training_facts(path: Path) -> dict:
    """Return what is known of how weights were trained: tools/train.py leaves it in its run, and in an export's card.

    Args:
        path: The checkpoint file.

    Returns:
        The keys of the card, as far as they are known; none for a file of other origin.

    Raises:
        UserError: If the card is damaged.
    """
    facts = {}
    if path.suffix == ".safetensors":
        card = path.with_suffix(".json")
    else:
        card = path.parent / "summary.json"
        options = load_checkpoint(path).get("options")
        if not isinstance(options, dict):  # no checkpoint of tools/train.py: a summary beside it is of another file
            return {}
        facts = dict(options=options, data=options.get("dataset") or "a folder of images")
    try:
        told = json.loads(card.read_text()) if card.is_file() else {}
    except ValueError as error:
        raise cli.UserError(f"the card {card} is damaged: {error}") from error
    if not isinstance(told, dict) or not isinstance(told.get("command", ""), str):
        raise cli.UserError(f"the card {card} is damaged: it must be what tools/train.py wrote")
    facts = {**told, **facts}
    kinds = dict(options=dict, best=dict, versions=dict, best_top1=float, best_epoch=int, epochs=int)
    for key, kind in kinds.items():
        if key in facts and not isinstance(facts[key], kind):
            raise cli.UserError(f"the card {card} is damaged: {key} is {facts[key]!r}")
    return facts


def model_card(model: nn.Module, name: str, settings: dict, facts: dict, measured: dict | None) -> str:
    """Return the text of README.md.

    Args:
        model: The model.
        name: Its architecture's name.
        settings: How images are prepared.
        facts: What ``training_facts`` found.
        measured: What ``validate.evaluate`` found at the export, and ``data``, the images' name; or None.
    """
    channels, *size = settings["input_size"]
    precision = str(next(model.parameters()).dtype).removeprefix("torch.")
    size, parameters = size_name(size), sum(p.numel() for p in model.parameters())
    import_line = "import raftmlp  # registers the model\n" if isinstance(model, RaftMLP) else ""
    whose = "RaftMLP, an MLP vision backbone ([arXiv 2108.04384](https://arxiv.org/abs/2108.04384)): "
    options, best = facts.get("options") or {}, facts.get("best") or {}
    not_told = "Not told: the weights came without a card of `tools/train.py`."
    data = f"`{facts['data']}`, as `tools/train.py` names it." if facts.get("data") else not_told

    recipe = []
    if facts.get("command"):
        recipe.append(f"Trained with raftmlp's `tools/train.py`:\n\n```\n{facts['command']}\n```\n")
    settled = {key: options[key] for key in RECIPE if options.get(key) is not None}
    if settled:
        recipe.append("| option | value |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in settled.items()))
    if facts.get("versions"):
        versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        recipe.append(f"With {versions}; commit {facts.get('commit') or 'unknown'}.")

    accuracy, limits = [], []
    if {"best_top1", "best_epoch", "epochs"} <= facts.keys():
        images = f", {best['eval_images']} images" if "eval_images" in best else ""
        accuracy.append(
            f"Top-1 {facts['best_top1']:.2f} % on the images that were held out in training{images}, after epoch "
            f"{facts['best_epoch']} of {facts['epochs']}."
        )
        limits.append("The epoch was chosen on the held-out images, so the figure on them is a little kind.")
    if measured:
        accuracy.append(
            f"Measured when this folder was written: top-1 {measured['top1']:.2f} %, top-5 {measured['top5']:.2f} % on "
            f"{measured['images']} images of {measured['data']}."
        )
    limits += [
        f"Images are to be prepared as `config.json` tells: {channels}x{size}, {settings['interpolation']}, mean "
        f"{_numbers(settings['mean'])}, deviation {_numbers(settings['std'])}.",
        "What the weights say of images unlike those that they were trained on is not known; nor is their probability "
        "calibrated.",
        "The licence of the weights is for whoever trained them to state.",
    ]
    if isinstance(model, RaftMLP):
        limits.insert(
            -2,
            f"Token mixing has weights for the grid of {size_name(model.img_size)} pixels. Other sizes are taken too, "
            f"and resized inside; expect the best accuracy near that size.",
        )
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "tags: [image-classification, timm, raftmlp]",
        "---",
        f"# {name}",
        "",
        f"{whose if isinstance(model, RaftMLP) else ''}{parameters / 1e6:.2f} million parameters in {precision}, "
        f"{model.num_classes} classes, images of {size} pixels.",
        "",
        "## Use",
        "",
        f"```python\nimport timm\n{import_line}",
        'model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "```",
        "",
        "## Data",
        "",
        data,
        "",
        "## Recipe",
        "",
        "\n".join(recipe) or not_told,
        "",
        "## Accuracy",
        "",
        "\n\n".join(accuracy) or "Not measured.",
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in limits),
    ]
    if isinstance(model, RaftMLP):
        lines += ["", "## Citation", "", f"```bibtex\n{CITATION}\n```"]
    return "\n".join(lines) + "\n"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def write_folder(model: nn.Module, settings: dict, card: str, folder: Path) -> None:
    """Write the folder whole, after timm has loaded it and made the same numbers of it.

    Raises:
        UserError: If the model cannot be written or comes back another.
    """
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".tmp.{folder.name}."))
    try:
        try:
            save_for_hf(model, str(beside), safe_serialization=True, data_config=settings)
            again = timm.create_model(f"local-dir:{beside}", pretrained=True).eval()
        except OSError:
            raise
        except Exception as error:  # safetensors and timm raise errors of many kinds
            raise cli.UserError(f"cannot write {folder}: {cli.first_words(error)}") from error
        images = torch.randn(2, *settings["input_size"], dtype=next(model.parameters()).dtype)
        with torch.inference_mode():
            if not torch.equal(again.to(images.dtype)(images), model(images)):
                raise cli.UserError(f"the model that timm loads from {folder} gives other numbers: it is not written")
        (beside / "README.md").write_text(card)
        config = json.loads((beside / "config.json").read_text())
        config["pretrained_cfg"].pop("license", None)  # timm's word for its own weights
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        beside.chmod(0o755)
        for file in beside.iterdir():
            file.chmod(0o644)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
