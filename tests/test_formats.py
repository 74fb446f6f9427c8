"""What a file holds, and which settings go together."""

import json

import pytest
import torch

from raftmlp.data.images import ImageSettings
from raftmlp.errors import UserError
from raftmlp.evaluate.evaluation import prepare_model
from raftmlp.export.formats import ExportSettings, build_graph, exported, exporter_errors, image_shape
from raftmlp.model.create import ModelSettings


@pytest.fixture(scope="module")
def prepared():
    return prepare_model(ModelSettings(model="raftmlp_digits", pretrained=True, img_size=[32, 44]), ImageSettings())


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(format="pt2", quantize="static"), "--quantize does not go with --format pt2"),
        (dict(format="torchscript", simplify=True), "--simplify does not go with --format torchscript"),
        (dict(format="hf", dynamic_size=True), "--dynamic-size does not go with --format hf"),
        (dict(quantize="dynamic", half="float16"), "leave --half and --features out"),
        (dict(format="tflite"), "format must be one of 'onnx', 'pt2'"),
        (dict(batch=-3), "batch must be a whole number of 1 or more, or None, not -3"),
        (dict(opset=17), "opset must be a whole number from 18 to 23, not 17"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(UserError, match=message):
        ExportSettings(**settings)


def test_a_graph_is_a_copy_in_its_precision(prepared):
    graph = build_graph(prepared, ExportSettings(half="bfloat16"))
    images = torch.randn(2, 3, 32, 44)
    with torch.inference_mode():
        logits, expected = graph.module(images), prepared.model(images)
    assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert next(prepared.model.parameters()).dtype == torch.float32
    metadata = {key: json.loads(value) for key, value in graph.metadata.items()}
    assert (metadata["model"], metadata["weights"], metadata["precision"]) == (
        "raftmlp_digits",
        "pretrained",
        "bfloat16",
    )
    assert metadata["settings"]["input_size"] == [3, 32, 44] and metadata["class_names"] == list("0123456789")


def test_feature_maps_are_named_with_their_channels_and_strides(prepared):
    graph = build_graph(prepared, ExportSettings(features=True))
    maps = json.loads(graph.metadata["maps"])
    info = prepared.model.feature_info
    assert [(m["name"], m["channels"], m["stride"]) for m in maps] == [
        (f"map_{i}", entry["num_chs"], entry["reduction"]) for i, entry in enumerate(info)
    ]
    assert graph.outputs == [m["name"] for m in maps] and graph.strides == [entry["reduction"] for entry in info]


@pytest.mark.parametrize("file_format, batch, least", [("onnx", None, (1, 1)), ("pt2", 5, (9, 9))])
def test_axes_are_free_where_the_settings_say_so(file_format, batch, least):
    """The operators of ONNX take a last map of one position too."""
    small = dict(embed_dims=(8, 16), depths=(1, 1), patch_sizes=(4, 2), patch_kernels=((4, 8), (2, 4)))
    prepared = prepare_model(ModelSettings(model="raftmlp_digits", model_kwargs=small), ImageSettings())
    graph = build_graph(prepared, ExportSettings(format=file_format, batch=batch, dynamic_size=True))
    program = exported(graph)
    assert [isinstance(side, int) for side in image_shape(program)] == [batch is not None, True, False, False]
    assert len(set(graph.example().shape)) == 4  # two axes of one length would be taken for one
    assert graph.strides[-1] == 8
    assert graph.least_size == least and json.loads(graph.metadata["least_size"]) == list(least)


def test_sizes_that_a_model_takes(prepared):
    graph = build_graph(prepared, ExportSettings())
    assert graph.takes((1, 1)) and graph.takes((40, 3))
    graph.module = torch.nn.MaxPool2d(2)
    assert graph.takes((2, 2)) and not graph.takes((1, 1))


def test_a_model_without_feature_maps():
    prepared = prepare_model(ModelSettings(model="raftmlp_digits"), ImageSettings())
    prepared.model = torch.nn.Identity()
    with pytest.raises(UserError, match="--features: raftmlp_digits has no feature maps in timm"):
        build_graph(prepared, ExportSettings(features=True))


def test_errors_of_exporters_become_user_errors_and_those_of_the_disk_stay():
    with pytest.raises(UserError, match="a file cannot be made of this model: why"), exporter_errors("a file"):
        raise AssertionError("why")
    with pytest.raises(OSError, match="full"), exporter_errors("a file"):
        raise OSError("full")
