"""The files that tools/export.py writes: how a network becomes each of them, and how each runs again.

``FORMATS`` is the table. A writer takes a ``Graph`` and gives the bytes of a file; a runtime takes a file and gives a
function of images, and with it the metadata that it found in the file.
"""

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
from pathlib import Path

import torch
from torch import Tensor, nn

import cli
from reports import size_name

Runtime = Callable[[Tensor], list[Tensor]]


class Logits(nn.Module):
    """A model as a file holds it: images (B, C, H, W) in float32, logits in float32, whatever is between.

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
class Graph:
    """What a file shall hold.

    Attributes:
        module: ``Logits`` or ``FeatureMaps``, in eval mode, on the CPU.
        channels: Channels of the images.
        size: Height and width of the images; where they are free, those to compare at first.
        batch: Images at a time, None if that is free.
        dynamic_size: Whether height and width are free.
        reduction: Pixels of the image for a position of the last map.
        outputs: Names of what comes out.
        metadata: What the file tells of itself, as JSON text by name.
        opset: Version of ONNX's operators.
        simplify: Have ONNX's graph simplified.
        least_size: Height and width from which on the graph holds; ``exported`` finds it.
    """

    module: Logits
    channels: int
    size: tuple[int, int]
    batch: int | None
    dynamic_size: bool
    reduction: int
    outputs: list[str]
    metadata: dict[str, str]
    opset: int
    simplify: bool
    least_size: tuple[int, int] = (1, 1)

    def example(self) -> Tensor:
        """Return images to trace the module with: free axes have lengths that are like no other."""
        height, width = self.size
        if self.dynamic_size:  # equal lengths would be taken for one
            height, width = (max(side, 2 * self.reduction) + more for side, more in zip(self.size, (3, 38)))
        return torch.randn(self.batch or 2, self.channels, height, width)


def need(package: str, purpose: str) -> None:
    """Refuse where an optional package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise cli.UserError(f"{purpose} needs the package {package}: pip install 'raftmlp[export]'")


@contextmanager
def _exporting(what: str) -> Iterator[None]:
    """Keep an exporter's chatter back, and turn what it raises into a user error: exporters raise anything."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except OSError:  # a full disk speaks for itself
        raise
    except Exception as error:
        raise cli.UserError(f"{what} cannot be made of this model: {cli.first_words(error)}") from error
    finally:
        logging.disable(before)


def exported(graph: Graph) -> torch.export.ExportedProgram:
    """Return the program of torch.export, its free axes free; sets the graph's ``least_size``."""
    images = graph.example()
    free = {}
    if graph.batch is None:
        free[0] = torch.export.Dim.AUTO
    if graph.dynamic_size:
        free[2] = free[3] = torch.export.Dim.AUTO
    with _exporting("a program of torch.export"):
        program = torch.export.export(graph.module, (images,), dynamic_shapes=(free,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where this machine keeps its source is nobody's business
    shape = _shape(program)
    for axis, name in ((0, "--batch dynamic"), (2, "--dynamic-size"), (3, "--dynamic-size")):
        if axis in free and isinstance(shape[axis], int):
            raise cli.UserError(f"{name}: torch.export cannot leave axis {axis} of this model's images free")
    if graph.dynamic_size:
        graph.least_size = tuple(int(program.range_constraints[side.node.expr].lower) for side in shape[2:])
        graph.metadata["least_size"] = json.dumps(graph.least_size)
        if any(side < least for side, least in zip(graph.size, graph.least_size)):
            raise cli.UserError(
                f"--dynamic-size: the graph would hold from {size_name(graph.least_size)} pixels on, where the last "
                f"map has more than one position; {size_name(graph.size)} is less (--img-size names another size)"
            )
    return program


def _shape(program: torch.export.ExportedProgram) -> torch.Size:
    """Return the shape of a program's images, symbols where it is free."""
    (name,) = program.graph_signature.user_inputs
    return next(node.meta["val"].shape for node in program.graph.nodes if node.name == name)


# ONNX


def write_onnx(graph: Graph) -> bytes:
    """Return an ONNX model of standard operators; runs in ONNX Runtime, and is written for TensorRT too."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "--format onnx")
    if graph.simplify:
        need("onnxslim", "--simplify")
    if graph.module.dtype == torch.bfloat16:
        raise cli.UserError("--format onnx --half bfloat16: ONNX Runtime has no bfloat16 convolution; float16 works")
    program = exported(graph)
    names = dict(zip(map(str, _shape(program)), ("batch", "channels", "height", "width")))
    with _exporting("an ONNX model"):
        model = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=graph.outputs,
            opset_version=graph.opset,
            external_data=False,
            verbose=False,
        ).model_proto
        if graph.simplify:
            import onnxslim

            model = onnxslim.slim(model)
    _tidy(model, names)
    if strange := {node.domain for node in model.graph.node} - {""}:
        raise cli.UserError(f"an ONNX model of standard operators cannot be made of this model: it needs {strange}")
    for name, value in graph.metadata.items():
        model.metadata_props.add(key=name, value=value)
    return model.SerializeToString()


def _tidy(model, names: dict[str, str]) -> None:
    """Call free axes of an ONNX model by their names, not s77, and take out what the exporter noted of the source."""
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    for value in values:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), axis.dim_param)
    for part in (*values, *model.graph.node, *model.graph.initializer, model.graph):
        del part.metadata_props[:]


def run_onnx(path: Path) -> tuple[Runtime, dict[str, str]]:
    """Return a function that runs an ONNX file in ONNX Runtime on the CPU, and the file's metadata."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]

    return run, session.get_modelmeta().custom_metadata_map


def quantize_onnx(content: bytes, how: str, batches: list[Tensor]) -> bytes:
    """Return an ONNX model whose products have 8-bit weights, by ONNX Runtime's own quantiser.

    Args:
        content: The ONNX model.
        how: "dynamic": activations are quantised as they come; "static": by what the batches show.
        batches: Images (B, C, H, W) for "static".
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(batches)

        def get_next(self):
            images = next(self.batches, None)
            return None if images is None else {"images": images.numpy()}

    with tempfile.TemporaryDirectory() as folder, _exporting("a quantised ONNX model"):
        plain, prepared, quantised = (str(Path(folder, name)) for name in ("plain", "prepared", "quantised"))
        Path(plain).write_bytes(content)
        quant_pre_process(plain, prepared)
        weights = quantization.QuantType.QInt8
        if how == "dynamic":
            quantization.quantize_dynamic(
                prepared, quantised, ["MatMul", "Gemm"], per_channel=True, weight_type=weights
            )
        else:
            quantization.quantize_static(
                prepared,
                quantised,
                Batches(),
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                weight_type=weights,
                activation_type=weights,
            )
        model, told = onnx.load(quantised), onnx.load_from_string(content).metadata_props
        del model.metadata_props[:]
        model.metadata_props.extend(told)
        used = {node.domain for node in model.graph.node}
        imports = [entry for entry in model.opset_import if entry.domain in used]
        del model.opset_import[:]
        model.opset_import.extend(imports)
        return model.SerializeToString()


# torch.export and AOTInductor


def write_pt2(graph: Graph) -> bytes:
    """Return a program of torch.export."""
    program, file = exported(graph), io.BytesIO()
    with _exporting("a program of torch.export"):
        torch.export.save(program, file, extra_files={"metadata.json": json.dumps(graph.metadata)})
    return file.getvalue()


def run_pt2(path: Path) -> tuple[Runtime, dict[str, str]]:
    """Return a function that runs a program of torch.export, and the file's metadata."""
    extra = {"metadata.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = torch.export.load(path, extra_files=extra).module()
    return (lambda images: _as_list(run(images))), json.loads(extra["metadata.json"])


def write_aoti(graph: Graph) -> bytes:
    """Return a package of AOTInductor: machine code for this kind of processor, and the weights."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise cli.UserError("--format aoti needs a C++ compiler, g++ or clang++: there is none on the PATH")
    program = exported(graph)
    with tempfile.TemporaryDirectory() as folder, _exporting("a package of AOTInductor"):
        path = Path(folder, "model.pt2")
        configs = {"freezing": True, "aot_inductor.metadata": graph.metadata}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
        return path.read_bytes()


def run_aoti(path: Path) -> tuple[Runtime, dict[str, str]]:
    """Return a function that runs a package of AOTInductor, and the file's metadata."""
    model = torch._inductor.aoti_load_package(str(path))
    return (lambda images: _as_list(model(images))), model.get_metadata()


# TorchScript


def write_torchscript(graph: Graph) -> bytes:
    """Return a TorchScript module."""
    if graph.batch is not None:
        raise cli.UserError(f"--format torchscript --batch {graph.batch}: a TorchScript module takes any batch")
    file = io.BytesIO()
    with _exporting("a TorchScript module"):
        if isinstance(graph.module, FeatureMaps):  # timm's ways to feature maps cannot be scripted
            if graph.dynamic_size:
                raise ValueError("its feature maps can be traced only, for one size: leave --dynamic-size out")
            script = torch.jit.trace(graph.module, graph.example())
        else:
            script = torch.jit.script(graph.module)
        torch.jit.save(script, file, _extra_files={"metadata.json": json.dumps(graph.metadata)})
    return _without_source(file)


def _without_source(file: io.BytesIO) -> bytes:
    """Return a TorchScript file without the source text and paths that torch keeps for its messages."""
    stripped = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(stripped, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                new.writestr(entry.filename, old.read(entry))
    return stripped.getvalue()


def run_torchscript(path: Path) -> tuple[Runtime, dict[str, str]]:
    """Return a function that runs a TorchScript module, and the file's metadata."""
    extra = {"metadata.json": ""}
    script = torch.jit.load(path, map_location="cpu", _extra_files=extra)
    return (lambda images: _as_list(script(images))), json.loads(extra["metadata.json"])


def _as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@dataclass(frozen=True)
class Format:
    """A kind of file: its suffix, who runs it, how it is written and how it is run."""

    suffix: str
    runtime: str
    write: Callable[[Graph], bytes]
    run: Callable[[Path], tuple[Runtime, dict[str, str]]]


FORMATS = dict(
    onnx=Format(".onnx", "ONNX Runtime", write_onnx, run_onnx),
    pt2=Format(".pt2", "torch.export", write_pt2, run_pt2),
    aoti=Format(".pt2", "AOTInductor", write_aoti, run_aoti),
    torchscript=Format(".pt", "TorchScript", write_torchscript, run_torchscript),
)
