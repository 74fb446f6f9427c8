"""A folder for the Hugging Face Hub: config.json, model.safetensors, and a README.md that describes the weights."""

import json
import shlex
from pathlib import Path

import timm
import torch
from huggingface_hub import ModelCard, ModelCardData
from timm.models import save_for_hf
from torch import nn

from ..checkpoints.description import EXIF_NOTES, MAPPING, TEXT, check_fields, number, parse_json
from ..checkpoints.weights import load_checkpoint
from ..errors import UserError
from ..files import new_folder
from ..model.raftmlp import RaftMLP
from ..sizes import size_name

__all__ = ["data_name", "model_card", "own_tag", "training_options", "training_record", "write_folder"]

UNKNOWN = "Not known: the weights came without a record of the training command."
RECIPE = (
    "epochs", "global_batch_size", "opt", "lr", "weight_decay", "sched", "warmup_epochs", "layer_decay", "smoothing",
    "drop_path", "aa", "mixup", "cutmix", "reprob", "model_ema", "img_size", "train_img_sizes", "seed",
)  # fmt: skip
COUNT = number(int, 0, 10**9)
RECORD = dict(
    options=MAPPING, best=MAPPING, versions=MAPPING, best_top1=number(float, 0, 100), best_epoch=COUNT, epochs=COUNT,
    command=TEXT, commit=TEXT, data=TEXT,
)  # fmt: skip


def training_record(path: Path) -> dict:
    """Return what is known of how weights were trained, as the training command or an export recorded it.

    A run's record is in its checkpoint and in summary.json beside it; that of NAME.safetensors is NAME.json.

    It has those keys that are known, none for a file of other origin: options, data, command, versions, commit, best,
    best_top1, best_epoch, epochs.

    Raises:
        UserError: If the JSON file is damaged.
    """
    of_checkpoint = {}
    if path.suffix == ".safetensors":
        file = path.with_suffix(".json")
    else:
        file = path.parent / "summary.json"
        options = load_checkpoint(path).get("options")
        if not isinstance(options, dict):  # not a run's checkpoint: the summary beside it is of another file
            return {}
        of_checkpoint = dict(options=options)
    record = parse_json(file.read_bytes(), f"the card {file}") if file.is_file() else {}
    if not isinstance(record, dict):
        raise UserError(f"the card {file} is damaged: it must be what the training command wrote")
    record = check_fields(record | of_checkpoint, RECORD, f"the card {file} is damaged: ")
    if options := record.get("options"):
        record["data"] = data_name(options.get("dataset"), options.get("data_dir")) or "a folder of images"
    return record


def training_options(checkpoint: str | None) -> dict:
    """Return the options that a checkpoint file was trained with, as far as ``training_record`` knows them."""
    return training_record(Path(checkpoint)).get("options", {}) if checkpoint else {}


def data_name(dataset: object, folder: object) -> str:
    """Return the name of data, which says nothing of where they lie: the data set's, or that of the folder alone."""
    return str(dataset or (Path(str(folder)).resolve().name if folder else ""))


def own_tag(architecture: str, file: Path, record: dict) -> str:
    """Return the tag of weights: that of their file's name, else the one that their run exported, or the run's name.

    ``record`` is that of ``training_record``; without one, a file of another name has no tag.
    """
    stem = file.name.removesuffix(".safetensors")
    if file.suffix == ".safetensors" and stem.startswith(f"{architecture}."):
        return stem.removeprefix(f"{architecture}.")
    return str(record.get("options", {}).get("export") or file.resolve().parent.name) if record else ""


def model_card(model: nn.Module, name: str, config: dict, record: dict, measured: dict | None) -> ModelCard:
    """Return the README.md of a model; ``measured`` are figures of ``evaluate``, and ``data``, the images' name."""
    task, is_ours = "image-classification", isinstance(model, RaftMLP)
    options, channels, *size = record.get("options") or {}, *config["input_size"]
    return ModelCard.from_template(
        ModelCardData(library_name="timm", pipeline_tag=task, tags=[task, "timm", "raftmlp"]),
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),  # timm's own states a license
        name=name,
        is_ours=is_ours,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        precision=str(next(model.parameters()).dtype).removeprefix("torch."),
        classes=model.num_classes,
        channels=channels,
        size=size_name(size),
        grid=size_name(model.img_size) if is_ours else "",
        config=config,
        recipe=[(key, options[key]) for key in RECIPE if options.get(key) is not None],
        unknown=UNKNOWN,
        measured=measured,
        has_best={"best_top1", "best_epoch", "epochs"} <= record.keys(),
        **{"best": {}, **record, "command": _without_folders(record.get("command") or "")},
    )


def _without_folders(command: str) -> str:
    """Return a command whose paths from the root or the home folder are shortened to their last names."""
    short = []
    for word in shlex.split(command):
        option, is_pair, value = word.rpartition("=")
        short.append(option + is_pair + (Path(value).name if value.startswith(("/", "~", "..")) else value))
    return shlex.join(short)


def write_folder(model: nn.Module, config: dict, card: ModelCard, folder: Path, tag: str = "") -> None:
    """Write the folder, after a check that timm loads it and gets the same outputs; ``tag`` is the weights' own.

    Raises:
        UserError: If the loaded model differs.
    """
    with new_folder(folder) as temporary:
        save_for_hf(model, str(temporary), safe_serialization=True, data_config=config)
        _rewrite_config(temporary / "config.json", tag, EXIF_NOTES[config.get("exif", True)])
        loaded = timm.create_model(f"local-dir:{temporary}", pretrained=True).eval()
        images = torch.randn(2, *config["input_size"], dtype=next(model.parameters()).dtype)
        with torch.inference_mode():
            if not torch.equal(loaded.to(images.dtype)(images), model(images)):
                raise UserError(f"the model that timm loads from {folder} gives other outputs: it is not written")
        card.save(temporary / "README.md")
        for file in temporary.iterdir():
            file.chmod(0o644)


def _rewrite_config(file: Path, tag: str, note: str) -> None:
    """Make timm's config.json one that transformers reads too, of weights with this tag and note."""
    content = json.loads(file.read_text())
    cfg = content["pretrained_cfg"]
    content.get("model_args", {}).pop("num_classes", None)  # transformers would pass it twice, it stands at the root
    for key in ("label_names", "label_descriptions"):  # both look at the root
        if key in cfg:
            content[key] = cfg.pop(key)
    for key in ("license", "tag", "file", "url"):  # of the weights that timm has for this model
        cfg.pop(key, None)
    if tag:
        cfg["tag"] = tag
    cfg["notes"] = [*(other for other in cfg.get("notes", ()) if other not in EXIF_NOTES.values()), note]
    file.write_text(json.dumps(content, indent=2) + "\n")
