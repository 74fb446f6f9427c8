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
    from torch import Tensor

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
    return {key: tuple(value.shape) for key, value in state.items() if not key.startswith(CLASSIFIERS)}


def find_variant(path: str, state: Mapping[str, Tensor], model: str | None, **kwargs) -> str:
    """Return the variant whose weights have these shapes, in the release's format or in ours.

    Raises:
        UserError: If it is none of them, or not the one of that name.
    """
    import timm

    from ..checkpoints.weights import describe_differences, summary
    from ..model.conversion import is_release_format, release_entries

    def differences(name: str) -> list[str]:
        network = timm.create_model(name, device="meta", **kwargs)
        is_release = is_release_format(state)
        expected = {e.key: e for e in release_entries(network)} if is_release else network.state_dict()
        return describe_differences(backbone_shapes(state), backbone_shapes(expected))

    names = [known_model(model, "raftmlp*")] if model else timm.list_models("raftmlp*")
    found = {name: differences(name) for name in names}
    name = min(found, key=lambda name: len(found[name]))
    if lines := found[name]:
        nearest = "" if model else f"; {name} comes nearest"
        kind = model or "variant of RaftMLP"
        raise UserError(f"{path} is no {kind}{nearest}, with {len(lines)} differences: {summary(lines)}")
    return name


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
    shape = tuple(getattr(state.get("stages.0.embed.convs.0.weight"), "shape", ()))
    in_chans = shape[1] if len(shape) == 4 and shape[1] else 3  # the release knows three channels; ours has others too
    kwargs = dict(img_size=as_size(args.img_size) if args.img_size else None, in_chans=in_chans)
    name = find_variant(args.checkpoint, state, args.model, **kwargs)

    classifier = next((state[f"{key}weight"] for key in CLASSIFIERS if f"{key}weight" in state), None)
    num_classes = 0 if classifier is None or classifier.ndim != 2 else len(classifier)
    model = timm.create_model(name, num_classes=num_classes, **kwargs)
    model.load_state_dict(state)
    cfg = dict(num_classes=model.num_classes, input_size=(model.in_chans, *model.img_size))
    save_state_dict(model.state_dict(), args.output, dict(model=name, pretrained_cfg=json.dumps(cfg)))
    say(
        f"{args.checkpoint}: {name} in {'the release' if is_release_format(state) else 'our'} format, {len(state)} "
        f"tensors, {sum(p.numel() for p in model.parameters()):,} parameters, {model.num_classes} classes, trained "
        f"grid of {model.img_size[0]}x{model.img_size[1]}"
    )
    say(f"written: {args.output}")
