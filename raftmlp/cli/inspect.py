"""Look inside a trained RaftMLP: what its token mixing has learnt, what its stages see, which blocks do how much.

    raftmlp inspect --checkpoint raftmlp_digits.safetensors --out runs/inspect --dataset digits
    raftmlp inspect --model raftmlp_digits --pretrained --out runs/inspect

Writes into the folder: vertical.png and horizontal.png (or plain.png), the weights of token mixing;
receptive_fields.png, the pixels that the middle of each stage's map depends on; updates.png, how much every mixing of
every block changes the map; and inspection.json, the figures of the last two. They are those of some images of a data
set, or of noise where none is named.
"""

from itertools import islice
from typing import TYPE_CHECKING

from ..config import ModelSettings
from ..data.settings import DataSettings, ImageSettings
from ..errors import UserError
from ..files import write_json
from ..settings import Count
from .console import say
from .options import Parser, option_type, output_folder

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_settings(ModelSettings, DataSettings, ImageSettings)
    group = parser.group("inspection")
    group.add_argument(
        "--images", type=option_type(Count), default=64, metavar="N", help="images to look at, of every class"
    )
    group.add_argument(
        "--out", type=option_type(output_folder), required=True, metavar="DIR", help="folder for the pictures"
    )
    return parser


def read_images(dataset: "Dataset", config: dict, count: int, settings: DataSettings) -> "Tensor":
    """Return so many images of a data set, or all if there are fewer, as a model takes them, (B, C, H, W)."""
    import torch

    from ..data.datasets import class_names
    from ..data.images import evaluation_loader, image_count
    from ..data.subset import take_images

    if not isinstance(dataset, torch.utils.data.IterableDataset):
        dataset = take_images(dataset, min(count, image_count(dataset)), 0, class_names(dataset))
    loader = evaluation_loader(dataset, config, torch.device("cpu"), settings.batch_size, settings.workers)
    batches = islice((images for images, _ in loader), -(-count // settings.batch_size))
    return torch.cat(list(batches))[:count]


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    parser.load_and_check(args)
    import torch

    from ..data.datasets import class_names
    from ..evaluate import plots
    from ..evaluate.evaluation import prepare_model, warn_of_random_weights
    from ..evaluate.inspection import mixing_weights, receptive_fields, smallest_share, update_norms
    from ..evaluate.labels import default_num_classes
    from ..model.raftmlp import RaftMLP

    settings, data = ModelSettings.select(vars(args)), DataSettings.select(vars(args))
    dataset = data.create(data.val_split) if data.dataset or data.data_dir else None
    classes = default_num_classes(class_names(dataset)) if dataset is not None else None
    prepared = prepare_model(settings, ImageSettings.select(vars(args)), None, classes)
    model, name, config = prepared.model, prepared.name, prepared.config
    if not isinstance(model, RaftMLP):
        raise UserError(f"{name} is no RaftMLP: inspect shows the token mixing of these alone")
    warn_of_random_weights([prepared])
    if dataset is not None:
        images, source = read_images(dataset, config, args.images, data), data.description
    else:
        torch.manual_seed(0)
        images, source = torch.randn(args.images, *config["input_size"]), "noise"
    of = f"{name}, {len(images)} images of {source}"

    weights = mixing_weights(model)
    for kind, blocks in weights.items():
        axis = {"vertical": ", down the columns", "horizontal": ", along the rows"}.get(kind, "")
        title = f"{name}: first weights of the {kind} token mixing{axis}"
        plots.draw_weights(args.out / f"{kind}.png", kind, title, blocks)
    fields, norms = receptive_fields(model, images), update_norms(model, images)
    halves = {layer: smallest_share(gradient) for layer, gradient in fields.items()}
    plots.draw_receptive_fields(args.out / "receptive_fields.png", f"effective receptive fields: {of}", fields)
    plots.draw_updates(args.out / "updates.png", of, norms)
    about = dict(model=name, weights=settings.weights, images=len(images), data=source)
    figures = dict(img_size=config["input_size"][-2:], half_of_the_gradient_in=halves, updates=norms)
    write_json(args.out / "inspection.json", about | figures)
    for layer, half in halves.items():
        say(f"{layer}: half of the gradient of its middle is in {half:.1%} of the pixels")
    for block, row in norms.items():
        say(f"{block}: updates of {', '.join(f'{kind} {value:.2f}' for kind, value in row.items())}")
    files = [*(f"{kind}.png" for kind in weights), "receptive_fields.png", "updates.png", "inspection.json"]
    say(f"in {args.out}: {', '.join(files)}")
