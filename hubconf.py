"""Entry points of torch.hub, a function for every variant: ``torch.hub.load(".", "raftmlp_s", source="local")``."""

from raftmlp.model.raftmlp import *  # noqa: F403

dependencies = ["torch", "timm", "safetensors"]
