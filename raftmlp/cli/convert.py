"""Turn a checkpoint, the authors' 2021 release's or ours, into a safetensors file of ours.

    raftmlp convert release.pth raftmlp_s.mine.safetensors
    raftmlp convert runs/digits/model_best.pth.tar raftmlp_digits.mine.safetensors

The variant is found by the shapes of its weights. A file NAME.TAG.safetensors in weights/, or in the folder that
$RAFTMLP_CHECKPOINTS names, is what timm.create_model("NAME.TAG", pretrained=True) loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import known_model, weights_file
from ..errors import UserError
from ..sizes import as_size
from .console import say
from .options import Parser, option_type

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASSIFIERS = ("classifier.", "head.")


def build_parser() -> Parser:
    parser = Parser("%(prog)s IN OUT.safetensors [OPTION ...]", yaml_config=False, description=__doc__)
    parser.add_argument(
        "checkpoint",
        type=weights_file,
        metavar="IN",
        help="file to read: .pth, .pt, .safetensors; or the folder of a run",
    )
    parser.add_argument("output", type=Path, metavar="OUT.safetensors", help="file to write")
    parser.add_argument("--model", metavar="NAME", help="the variant, if you know it")
    parser.checks["model"] = known_model
    parser.add_argument(
        "--img-size",
        type=option_type(as_size),
        nargs="+",
        metavar="N|HxW",
        help="image size the checkpoint's trained grid is made for (default: the variant's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write over an existing file")
    return parser


def backbone_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple]:
    """Return the shapes of all weights but the classifier's, which differs from task to task."""
    from ..checkpoints.weights import shapes

    return {key: shape for key, shape in shapes(state).items() if not key.startswith(CLASSIFIERS)}


def expected_shapes(name: str, release: bool, **kwargs) -> dict[str, tuple]:
    """Return the same of a variant, in the release's format or in ours."""
    import timm

    from ..model.conversion import release_entries

    model = timm.create_model(name, device="meta", **kwargs)
    if not release:
        return backbone_shapes(model.state_dict())
    return {entry.key: entry.shape for entry in release_entries(model) if not entry.key.startswith(CLASSIFIERS)}


def find_variant(path: str, given: dict[str, tuple], release: bool, model: str | None, **kwargs) -> str:
    """Return the variant whose weights have the given shapes.

    Raises:
        UserError: If it is none of them, or not the one of that name.
    """
    import timm

    from ..checkpoints.weights import describe_differences

    names = [known_model(model, "raftmlp*")] if model else timm.list_models("raftmlp*")
    differences = {name: describe_differences(given, expected_shapes(name, release, **kwargs)) for name in names}
    name = min(differences, key=lambda name: len(differences[name]))
    if differences[name]:
        lines = differences[name][:20] + ["..."] * (len(differences[name]) > 20)
        nearest = "" if model else f"; {name} comes nearest"
        raise UserError(
            f"{path} is no {model or 'variant of RaftMLP'}{nearest}, with {len(differences[name])} differences:\n  "
            + "\n  ".join(lines)
        )
    return name


def load(state: Mapping[str, Tensor], model: nn.Module, path: str) -> None:
    """Load weights strictly, and see that the model computes finite numbers with them.

    Raises:
        UserError: If the classifier does not fit, or a weight is not finite.
    """
    import torch

    from ..checkpoints.weights import describe_differences, shapes
    from ..model.conversion import adapt_state_dict

    state = adapt_state_dict(state, model, path)
    if lines := describe_differences(shapes(state), shapes(model.state_dict())):
        name = model.pretrained_cfg["architecture"]
        raise UserError(f"{path} is a {name}, but its classifier is damaged: {'; '.join(lines)}")
    model.load_state_dict(state)
    with torch.inference_mode():
        logits = model.eval()(torch.zeros(1, model.in_chans, *model.img_size))
    if not logits.isfinite().all():
        raise UserError(f"{path} has weights that are not finite")


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.output.suffix != ".safetensors":
        raise UserError(f"the output {args.output} must be named .safetensors")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} exists; --overwrite writes over it")
    parser.load_and_check(args)
    import timm

    from ..checkpoints.weights import load_state_dict, save_state_dict
    from ..model.conversion import is_release_format

    state = load_state_dict(args.checkpoint)
    release, given = is_release_format(state), backbone_shapes(state)
    stem = given.get("stages.0.embed.convs.0.weight", ())  # the release knows three channels; ours may have others
    in_chans = stem[1] if len(stem) == 4 and stem[1] else 3
    kwargs = dict(img_size=as_size(args.img_size) if args.img_size else None, in_chans=in_chans)
    name = find_variant(args.checkpoint, given, release, args.model, **kwargs)

    classifier = next((state[f"{key}weight"] for key in CLASSIFIERS if f"{key}weight" in state), None)
    num_classes = 0 if classifier is None or classifier.ndim != 2 else len(classifier)
    model = timm.create_model(name, num_classes=num_classes, **kwargs)
    load(state, model, args.checkpoint)
    cfg = dict(num_classes=model.num_classes, input_size=(model.in_chans, *model.img_size))
    try:
        save_state_dict(model.state_dict(), args.output, dict(model=name, pretrained_cfg=json.dumps(cfg)))
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error.strerror}") from error
    say(
        f"{args.checkpoint}: {name} in {'the release format' if release else 'our format'}, {len(state)} tensors, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {model.num_classes} classes, trained grid of "
        f"{model.img_size[0]}x{model.img_size[1]}"
    )
    say(f"written: {args.output}")
