"""The files of other runtimes: what each holds, how it is written, and how it is run.

``FORMATS`` is the table. A writer takes an ``ExportSpec`` and returns the bytes of a file; a runner takes a file and
returns a function of images, and the metadata in the file.
"""

import copy
import importlib.util
import io
import json
import logging
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .. import __version__
from ..config import OPSET, ExportSettings
from ..errors import MissingPackageError, UserError, install_command
from ..evaluate.evaluation import PreparedModel, run_once
from ..evaluate.labels import model_class_names
from ..sizes import size_name

__all__ = ["FORMATS", "ExportSpec", "FeatureMaps", "Format", "Logits", "create_spec", "quantize_onnx"]

_logger = logging.getLogger(__name__)

Runtime = Callable[[Tensor], list[Tensor]]


class Logits(nn.Module):
    """A model as a file holds it: images (B, C, H, W) in float32, logits in float32, any type between.

    Args:
        model: The model.
        dtype: The type of its weights.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).float()


class FeatureMaps(Logits):
    """The same for the model's feature maps, (B, channels, H / stride, W / stride) each, from fine to coarse."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.forward_intermediates(images.to(self.dtype), intermediates_only=True)
        return tuple(y.float() for y in maps)


@dataclass
class ExportSpec:
    """What a file shall hold.

    Attributes:
        module: ``Logits`` or ``FeatureMaps``, in eval mode, on the CPU.
        channels: Channels of the images.
        size: Height and width of the images; if they are free, those to compare at first.
        settings: What to write.
        strides: Pixels of the image per position of each feature map.
        outputs: Names of the outputs.
        metadata: JSON texts by name, which the file carries.
        least_size: The smallest height and width that the file takes; ``exported`` sets it.
    """

    module: Logits
    channels: int
    size: tuple[int, int]
    settings: ExportSettings
    strides: list[int]
    outputs: list[str]
    metadata: dict[str, str]
    least_size: tuple[int, int] = (1, 1)

    def example(self) -> Tensor:
        """Return images to trace the module with: free axes have lengths that no other axis has."""
        height, width = self.size
        if self.settings.dynamic_size:  # equal lengths would be taken for one
            height, width = (max(side, 2 * max(self.strides)) + more for side, more in zip(self.size, (3, 38)))
        return torch.randn(self.settings.batch or 2, self.channels, height, width)

    @torch.inference_mode()
    def takes(self, size: tuple[int, int]) -> bool:
        """Whether the module takes images of this height and width."""
        try:
            self.module(torch.zeros(1, self.channels, *size))
        except Exception:  # models raise anything on sizes that they cannot take
            return False
        return True


def create_spec(prepared: PreparedModel, settings: ExportSettings) -> ExportSpec:
    """Return what a file shall hold, of a copy of the model.

    Raises:
        UserError: If the model has no feature maps, or takes no images of its size.
    """
    model, config = prepared.model, prepared.config
    if settings.features and not hasattr(model, "forward_intermediates"):
        raise UserError(f"--features: {prepared.name} has no feature maps in timm")
    kind = FeatureMaps if settings.features else Logits
    module = kind(copy.deepcopy(model).to(settings.dtype), settings.dtype).eval()
    outputs = run_once(module, prepared.name, config["input_size"])
    preparation = {key: value for key, value in config.items() if key != "background"}  # the reader's choice
    weights = Path(prepared.weights).name
    metadata = dict(model=prepared.name, weights=weights, settings=preparation, precision=settings.precision)
    stages, names = getattr(model, "feature_info", None) or [dict(reduction=32)], ["logits"]
    strides = [stage["reduction"] for stage in stages]
    if settings.features:
        names = [f"map_{i}" for i in range(len(outputs))]
        maps = zip(names, outputs, strides if len(strides) == len(outputs) else [None] * len(outputs))
        metadata["maps"] = [dict(name=name, channels=y.shape[1], stride=stride) for name, y, stride in maps]
    elif model.num_classes:
        metadata["class_names"] = model_class_names(model)
    metadata.update(raftmlp=__version__, torch=torch.__version__)
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    channels, *size = config["input_size"]
    return ExportSpec(module, channels, tuple(size), settings, strides, names, texts)


@contextmanager
def quiet_exporter(product: str) -> Iterator[None]:
    """Say what is made, which takes up to minutes, and silence the exporter that makes it."""
    _logger.info(f"making {product} ...")
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings(), torch.no_grad():
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def exported(spec: ExportSpec) -> torch.export.ExportedProgram:
    """Return the program of torch.export, its free axes free; sets the spec's ``least_size``.

    torch.export takes a free axis of length 1 for a constant, so a program's last map has more positions than one. The
    operators of ONNX do not depend on it: there the least size is the model's.

    Raises:
        UserError: If the model cannot be exported with these axes free.
    """
    is_dynamic = spec.settings.dynamic_size
    options = {0: spec.settings.batch is None and "--batch dynamic"}
    options |= dict.fromkeys((2, 3), is_dynamic and "--dynamic-size")
    free = {axis: torch.export.Dim.AUTO for axis, option in options.items() if option}
    with quiet_exporter("a program of torch.export"):
        program = torch.export.export(spec.module, (spec.example(),), dynamic_shapes=(free,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # would show the paths of this machine's source
    shape = image_shape(program)
    for axis in free:
        if isinstance(shape[axis], int):
            raise UserError(f"{options[axis]}: torch.export cannot leave axis {axis} of this model's images free")
    if is_dynamic and not (spec.settings.format == "onnx" and spec.takes((1, 1))):
        spec.least_size = tuple(int(program.range_constraints[side.node.expr].lower) for side in shape[2:])
        if any(side < least for side, least in zip(spec.size, spec.least_size)):
            raise UserError(f"--dynamic-size: the file takes images of {size_name(spec.least_size)} pixels or more")
    if is_dynamic:
        spec.metadata["least_size"] = json.dumps(spec.least_size)
    return program


def image_shape(program: torch.export.ExportedProgram) -> torch.Size:
    """Return the shape of a program's images, with symbols for free axes."""
    (name,) = program.graph_signature.user_inputs
    return next(node.meta["val"].shape for node in program.graph.nodes if node.name == name)


# ONNX


def write_onnx(spec: ExportSpec) -> bytes:
    """Return an ONNX model of standard operators; it runs in ONNX Runtime, and is made for TensorRT too."""
    for package in ["onnx", "onnxscript", "onnxruntime"] + ["onnxslim"] * spec.settings.simplify:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"needs the package {package}: {install_command('demo', 'export')}")
    if spec.module.dtype == torch.bfloat16:
        raise UserError("--format onnx --half bfloat16: ONNX Runtime has no bfloat16 convolution; float16 works")
    program = exported(spec)
    names = dict(zip(map(str, image_shape(program)), ("batch", "channels", "height", "width")))
    with quiet_exporter("an ONNX model"):
        model = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=spec.outputs,
            opset_version=spec.settings.opset or OPSET,
            external_data=False,
            verbose=False,
        ).model_proto
        if spec.settings.simplify:
            import onnxslim

            model = onnxslim.slim(model)
    _clean(model, names)
    if domains := {node.domain for node in model.graph.node} - {""}:
        raise UserError(f"an ONNX model of standard operators cannot be made of this model: it needs {domains}")
    for name, value in spec.metadata.items():
        model.metadata_props.add(key=name, value=value)
    return model.SerializeToString()


def _clean(model, names: dict[str, str]) -> None:
    """Name the free axes of an ONNX model, in place of s77, and remove the exporter's notes on the source."""
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    for value in values:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(r"\bs\d+\b", lambda match: names.get(match[0], match[0]), axis.dim_param)
    for part in (*values, *model.graph.node, *model.graph.initializer, model.graph):
        del part.metadata_props[:]


def run_onnx(path: Path) -> tuple[Runtime, dict[str, str]]:
    """Return a function that runs an ONNX file in ONNX Runtime on the CPU, and the file's metadata."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what it logs as errors, it raises too
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]

    return run, session.get_modelmeta().custom_metadata_map


def quantize_onnx(content: bytes, kind: str, batches: list[Tensor]) -> bytes:
    """Return an ONNX model whose products have 8-bit weights, made by ONNX Runtime's own quantizer.

    Args:
        content: The ONNX model.
        kind: "dynamic": the scales of activations are computed at each run; "static": taken from the batches.
        batches: Images (B, C, H, W) for "static".
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    products, int8 = ["MatMul", "Gemm"], quantization.QuantType.QInt8
    with tempfile.TemporaryDirectory() as folder, quiet_exporter("a quantized ONNX model"):
        plain, prepared, quantized = (str(Path(folder, name)) for name in ("plain", "prepared", "quantized"))
        Path(plain).write_bytes(content)
        quant_pre_process(plain, prepared)
        if kind == "dynamic":
            quantization.quantize_dynamic(prepared, quantized, products, per_channel=True, weight_type=int8)
        else:
            inputs = iter([{"images": batch.numpy()} for batch in batches])
            quantization.quantize_static(
                prepared,
                quantized,
                SimpleNamespace(get_next=partial(next, inputs, None)),
                op_types_to_quantize=["Conv", *products],
                weight_type=int8,
                activation_type=int8,
            )
        model = onnx.load(quantized)
    del model.metadata_props[:]
    model.metadata_props.extend(onnx.load_from_string(content).metadata_props)
    used = {node.domain for node in model.graph.node}
    opsets = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    return model.SerializeToString()


# torch.export and AOTInductor


def write_pt2(spec: ExportSpec) -> bytes:
    """Return a program of torch.export."""
    program, file = exported(spec), io.BytesIO()
    with quiet_exporter("a file of it"):
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(spec.metadata)})
    return file.getvalue()


def run_pt2(path: Path) -> tuple[Runtime, dict[str, str]]:
    """Return a function that runs a program of torch.export, and the file's metadata."""
    extra = {"metadata.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = torch.export.load(path, extra_files=extra).module()
    return (lambda images: as_list(run(images))), json.loads(extra["metadata.json"])


def write_aoti(spec: ExportSpec) -> bytes:
    """Return a package of AOTInductor: machine code for this kind of processor, and the weights."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise UserError("--format aoti needs a C++ compiler, g++ or clang++: there is none on the PATH")
    from .inductor import compile_package  # torch's own code generator, not the same in every version

    program, settings = exported(spec), spec.settings
    least = settings.batch or 1, spec.channels, *(spec.least_size if settings.dynamic_size else spec.size)
    with tempfile.TemporaryDirectory() as folder, quiet_exporter("a package of AOTInductor"):
        path = Path(folder, "model.pt2")
        compile_package(program, path, least, image_shape(program), spec.metadata)
        return path.read_bytes()


def run_aoti(path: Path) -> tuple[Runtime, dict[str, str]]:
    """Return a function that runs a package of AOTInductor, and the file's metadata."""
    model = torch._inductor.aoti_load_package(str(path))
    return (lambda images: as_list(model(images))), model.get_metadata()


# TorchScript


def write_torchscript(spec: ExportSpec) -> bytes:
    """Return a TorchScript module, without the source text and paths that torch keeps in it for its messages."""
    if spec.settings.batch is not None:
        raise UserError(f"--format torchscript --batch {spec.settings.batch}: a TorchScript module takes any batch")
    is_traced = isinstance(spec.module, FeatureMaps)  # timm's ways to feature maps cannot be scripted
    if is_traced and spec.settings.dynamic_size:
        raise UserError("--format torchscript --features can be traced only, for one size: leave --dynamic-size out")
    file, stripped = io.BytesIO(), io.BytesIO()
    with quiet_exporter("a TorchScript module"):
        script = torch.jit.trace(spec.module, spec.example()) if is_traced else torch.jit.script(spec.module)
        torch.jit.save(script, file, _extra_files={"metadata.json": json.dumps(spec.metadata)})
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(stripped, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            if not member.filename.endswith(".debug_pkl"):
                new.writestr(member.filename, old.read(member))
    return stripped.getvalue()


def run_torchscript(path: Path) -> tuple[Runtime, dict[str, str]]:
    """Return a function that runs a TorchScript module, and the file's metadata."""
    extra = {"metadata.json": ""}
    script = torch.jit.load(path, map_location="cpu", _extra_files=extra)
    return (lambda images: as_list(script(images))), json.loads(extra["metadata.json"])


def as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Return one output or several as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@dataclass(frozen=True)
class Format:
    """A kind of file: its suffix, the name of its runtime, how it is written and how it is run."""

    suffix: str
    runtime: str
    write: Callable[[ExportSpec], bytes]
    run: Callable[[Path], tuple[Runtime, dict[str, str]]]


FORMATS = dict(
    onnx=Format(".onnx", "ONNX Runtime", write_onnx, run_onnx),
    pt2=Format(".pt2", "torch.export", write_pt2, run_pt2),
    aoti=Format(".pt2", "AOTInductor", write_aoti, run_aoti),
    torchscript=Format(".pt", "TorchScript", write_torchscript, run_torchscript),
)
