"""What the commands for mmdet and mmseg share: their options, and how they read a config."""

import argparse
import os
from typing import TYPE_CHECKING

from ..errors import MissingPackageError, UserError
from ..settings import Share
from .config_files import find_config
from .launcher import load_package
from .options import Parser, option_type

if TYPE_CHECKING:
    from mmengine.config import Config


def key_value(text: str) -> str:
    """Return a text of the form KEY=VALUE."""
    if "=" not in text:
        raise UserError(f"must be KEY=VALUE, not {text!r}")
    return text


def add_config_options(parser: Parser, work_dir: str = "") -> None:
    """Offer which config and what is changed in it; of a run in ``work_dir`` also where, and what started it."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a config of mmdet or mmseg, or the name of a shipped one (detection/mask_rcnn_raftmlp_digits)",
    )
    add = parser.group("config").add_argument
    add(
        "--cfg-options",
        nargs="+",
        type=option_type(key_value),
        default=[],
        metavar="KEY=VALUE",
        help="change the config, for example optim_wrapper.optimizer.lr=1e-3 model.backbone.with_cp=True",
    )
    if work_dir:
        add("--work-dir", metavar="DIR", help=f"folder of the run (default: {work_dir})")
        add("--data-dir", metavar="DIR", help="folder of the data (default: the config's data_root)")
        default = "pytorch" if "TORCHELASTIC_RUN_ID" in os.environ else "none"
        launchers, words = ("none", "pytorch", "slurm", "mpi"), "what started several processes; torchrun is recognized"
        add("--launcher", choices=launchers, default=default, help=words)


def add_checkpoint_options(parser: Parser) -> None:
    """Offer whose predictions are made, and which are shown."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run: its newest")
    add, score = parser.group("output").add_argument, option_type(Share)
    add("--score-thr", type=score, default=0.3, metavar="P", help="show objects from this score on")


def load_config(args: argparse.Namespace) -> "Config":
    """Return the config that the options name, with their changes; mmengine then reads and writes files safely."""
    path = find_config(args.config, ".py")
    load_package()
    try:
        import mmdet  # noqa: F401
        import mmseg  # noqa: F401
        from mmengine.config import DictAction
    except ImportError as error:
        raise MissingPackageError(
            f"mmdet and mmseg are not installed, or do not work here ({error}): the repository's tools/install_mm.py "
            f"installs them"
        ) from error
    from ..mm.checkpoints import patch_mmengine
    from ..mm.configs import read_config

    patch_mmengine()
    DictAction([], "changes")(None, args, args.cfg_options)
    places = {key: getattr(args, key) for key in ("data_dir", "work_dir", "launcher") if hasattr(args, key)}
    return read_config(path, args.changes, **places)
