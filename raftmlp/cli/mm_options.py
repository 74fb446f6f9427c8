"""What the commands for mmdet and mmseg share: the check that both are installed, and their options."""

import argparse
import os
from typing import Any

from ..errors import MissingPackageError, UserError, first_words
from ..settings import Share
from .options import Parser, option_type


def check_packages() -> None:
    """Import mmdet and mmseg.

    Raises:
        MissingPackageError: If they, or what they need, are not installed.
    """
    try:
        import mmdet  # noqa: F401
        import mmengine.runner  # noqa: F401
        import mmseg  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"mmdet and mmseg are not installed, or do not work here ({error}): the repository's tools/install_mm.py "
            f"installs them"
        ) from error


def key_value(text: str) -> str:
    """Return a text of the form KEY=VALUE.

    Raises:
        UserError: If it has another one.
    """
    if "=" not in text:
        raise UserError(f"must be KEY=VALUE, not {text!r}")
    return text


def config_changes(texts: list[str]) -> dict[str, Any]:
    """Return what KEY=VALUE texts change in a config, as mmengine reads them.

    Raises:
        UserError: If it cannot read one.
    """
    from mmengine.config import DictAction

    changes = argparse.Namespace()
    try:
        DictAction(["--cfg-options"], "cfg_options")(argparse.ArgumentParser(), changes, texts)
    except (AssertionError, ValueError) as error:
        raise UserError(f"--cfg-options {' '.join(texts)}: {first_words(error)}") from error
    return changes.cfg_options


def add_config_options(parser: Parser) -> argparse._ArgumentGroup:
    """Offer which config, and what is changed in it; returns the group of options."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a config of mmdet or mmseg, or the name of a shipped one (detection/mask_rcnn_raftmlp_digits)",
    )
    group = parser.group("config")
    group.add_argument(
        "--cfg-options",
        nargs="+",
        type=option_type(key_value),
        default=[],
        metavar="KEY=VALUE",
        help="change the config, for example optim_wrapper.optimizer.lr=1e-3 model.backbone.with_cp=True",
    )
    return group


def add_run_options(parser: Parser, work_dir: str) -> None:
    """Offer the config, where the files of a run and its data are, and what started its processes."""
    group = add_config_options(parser)
    group.add_argument("--work-dir", metavar="DIR", help=f"folder of the run (default: {work_dir})")
    group.add_argument("--data-dir", metavar="DIR", help="folder of the data (default: the config's data_root)")
    group.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        default="pytorch" if "TORCHELASTIC_RUN_ID" in os.environ else "none",
        help="what started several processes; torchrun is recognised",
    )


def add_checkpoint_options(parser: Parser) -> argparse._ArgumentGroup:
    """Offer whose predictions are made, and which are shown; returns the group of options for the output."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run: its newest")
    group = parser.group("output")
    score = option_type(Share)
    group.add_argument("--score-thr", type=score, default=0.3, metavar="P", help="show objects from this score on")
    return group
