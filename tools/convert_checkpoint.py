#!/usr/bin/env python
"""Turn a checkpoint, the authors' 2021 release's or ours, into a safetensors file of ours.

    python tools/convert_checkpoint.py release.pth raftmlp_s.mine.safetensors
    python tools/convert_checkpoint.py runs/digits/model_best.pth.tar raftmlp_digits.mine.safetensors

The variant is found by the shapes of its weights. A file NAME.TAG.safetensors in checkpoints/, or in the folder that
$RAFTMLP_CHECKPOINTS names, is what timm.create_model("NAME.TAG", pretrained=True) loads.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
from torch import Tensor

import cli
from raftmlp.checkpoint import (
    adapt_state_dict,
    describe_differences,
    is_release_format,
    load_state_dict,
    release_entries,
    save_state_dict,
    shapes,
)

CLASSIFIERS = ("classifier.", "head.")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(__doc__.splitlines()[2:]),
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="IN", help="file to read: .pth, .pt, .safetensors")
    parser.add_argument("output", metavar="OUT.safetensors", help="file to write")
    parser.add_argument("--model", metavar="NAME", help="the variant, if you know it")
    parser.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        metavar="N",
        help="image size the checkpoint's trained grid is made for (default: the variant's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write over an existing file")
    return parser


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple]:
    """Return the shapes of all weights but the classifier's, which any task has of its own."""
    return {key: shape for key, shape in shapes(state).items() if not key.startswith(CLASSIFIERS)}


def expected_shapes(name: str, release: bool, **kwargs) -> dict[str, tuple]:
    """Return the same of a variant, in the release's format or in ours."""
    model = timm.create_model(name, device="meta", **kwargs)
    if not release:
        return shapes_of(model.state_dict())
    return {entry.key: entry.shape for entry in release_entries(model) if not entry.key.startswith(CLASSIFIERS)}


def main() -> None:
    args = build_parser().parse_args()
    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise cli.UserError(f"the output {output} must be named .safetensors")
    if output.exists() and not args.overwrite:
        raise cli.UserError(f"{output} exists; --overwrite writes over it")
    with cli.user_errors(ValueError, FileNotFoundError):
        state = load_state_dict(args.checkpoint)
    release = is_release_format(state)
    found = shapes_of(state)

    # the release knows three channels; ours may have been built with others
    stem = found.get("stages.0.embed.convs.0.weight")
    kwargs = dict(img_size=cli.image_size(args.img_size), in_chans=stem[1] if stem else 3)
    names = [cli.known_model(args.model, "raftmlp*")] if args.model else timm.list_models("raftmlp*")
    differences = {name: describe_differences(found, expected_shapes(name, release, **kwargs)) for name in names}
    name = min(differences, key=lambda name: len(differences[name]))
    if differences[name]:
        lines = differences[name][:20] + ["..."] * (len(differences[name]) > 20)
        raise cli.UserError(
            f"{args.checkpoint} is no {args.model or 'variant of RaftMLP'}"
            + ("" if args.model else f"; {name} comes nearest")
            + f", with {len(differences[name])} differences:\n  "
            + "\n  ".join(lines)
        )

    classifier = next((state[f"{key}weight"] for key in CLASSIFIERS if f"{key}weight" in state), None)
    num_classes = 0 if classifier is None else len(classifier)
    model = timm.create_model(name, num_classes=num_classes, **kwargs)
    with cli.user_errors(ValueError):
        state = adapt_state_dict(state, model)
    if lines := describe_differences(shapes(state), shapes(model.state_dict())):
        raise cli.UserError(f"{args.checkpoint} is a {name}, but its classifier is damaged: {'; '.join(lines)}")
    model.load_state_dict(state)
    with torch.inference_mode():
        logits = model.eval()(torch.zeros(1, model.in_chans, *model.img_size))
    if not logits.isfinite().all():
        raise cli.UserError(f"{args.checkpoint} has weights that are not finite")

    cfg = dict(num_classes=num_classes, input_size=(model.in_chans, *model.img_size))
    try:
        save_state_dict(model.state_dict(), output, dict(model=name, pretrained_cfg=json.dumps(cfg)))
    except OSError as error:
        raise cli.UserError(f"cannot write {output}: {error.strerror}") from error
    print(
        f"{args.checkpoint}: {name} in {'the release format' if release else 'our format'}, {len(state)} tensors, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {num_classes} classes, "
        f"trained grid of {model.img_size[0]}x{model.img_size[1]}"
    )
    print(f"written: {output}")


if __name__ == "__main__":
    cli.run(main)
