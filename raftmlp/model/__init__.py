"""The network and its layers; importing it registers the models with timm."""
