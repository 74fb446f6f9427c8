"""A package of AOTInductor that takes images of any strides and refuses those that its code was not compiled for.

Compiled code reads its input as memory of the size, type and strides of the example, whatever it is given. torch can
check them, but only if AOTI_RUNTIME_CHECK_INPUTS is set where the package runs, and then it refuses other strides. So
the package gets a check of its own, in place of torch's.
"""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

__all__ = ["compile_package"]

# The name is that of the check that torch's code calls at first, with tensors that it may replace.
CHECK = """
AOTI_NOINLINE static void __check_inputs_outputs(AtenTensorHandle* input_handles, AtenTensorHandle*) {{
    constexpr int64_t least[] = {{{least}}}, most[] = {{{most}}};
    AtenTensorHandle images = input_handles[0];
    int32_t dtype, device;
    int64_t dim, *sizes;
    bool is_contiguous;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(images, &dtype));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(images, &device));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(images, &dim));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(images, &sizes));
    bool fits = dtype == aoti_torch_dtype_float32() && device == aoti_torch_device_type_cpu() && dim == 4;
    for (int axis = 0; fits && axis < 4; axis++) {{
        fits = least[axis] <= sizes[axis] && sizes[axis] <= most[axis];
    }}
    if (!fits) {{
        aoti_torch_delete_tensor_object(images);  // the caller has given it away
        throw std::runtime_error("the file takes {wanted}");
    }}
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(images, &is_contiguous));
    if (!is_contiguous) {{
        const int64_t strides[] = {{sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1}};
        AtenTensorHandle copy;
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, dtype, device, 0, &copy));
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy, images, 0));
        aoti_torch_delete_tensor_object(images);
        input_handles[0] = copy;
    }}
}}
"""


def compile_package(
    program: torch.export.ExportedProgram, path: Path, least: Sequence[int], most: Sequence, metadata: dict[str, str]
) -> None:
    """Compile a program whose one input is images, float32 on the CPU, and write the package.

    Args:
        program: The program.
        path: The package to write.
        least: The smallest lengths of the axes.
        most: The largest lengths, symbols for the free axes.
        metadata: Texts by name, for the package.
    """
    lengths = [str(high) if isinstance(high, int) else f"{low} or more" for low, high in zip(least, most)]
    check = CHECK.format(
        least=", ".join(map(str, least)),
        most=", ".join(str(high) if isinstance(high, int) else "INT64_MAX" for high in most),
        wanted=f"images ({', '.join(lengths)}) in float32 on the CPU",
    )
    configs = {"freezing": True, "aot_inductor.metadata": metadata}
    name = "generate_input_output_runtime_checks"
    with patch.object(CppWrapperCpu, name, lambda wrapper: wrapper.prefix.splice(check)):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
