"""The tensor operations of a TENGraD step, as ops of `torch.library`.

Each op has three implementations with the same arguments, which its `KernelSpec` lists:

1. `triton_impl` launches Triton kernels. The op calls it for CUDA tensors in single or half precision.
2. `torch_impl` is tuned PyTorch code (`cpu`, `cpu_conv`, `cpu_update`). The op calls it for all other tensors.
3. `reference` is the definition (`reference`), kept simple on purpose. Only tests call it, to check the other two.

The file of an op holds the op, its kernel, its launch configurations and its `KernelSpec`. Most files have the name of
their op. `gram` also has `gram_rows`; `triangular` has `cholesky_inverse` and `cholesky_solve`; `project_factored`,
`expand_factored` and `conv` have the products with factors. `dispatch` registers ops and chooses the implementation,
`spec` defines `KernelSpec`, `pointer_table` explains how one launch takes a list of tensors, and `repeated` launches
the products of a step again in the next one.

Sums over half-precision entries, rows of J among them, are computed and returned in float32.
Docstrings cite the paper's equations by number, and the sections M1, M2, … of docs/math.md.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient, L Fisher
blocks.
"""

from .cholesky import SPECS as CHOLESKY_SPECS
from .cholesky import cholesky
from .conv import SPECS as CONV_SPECS
from .conv import conv_products, expand_conv_update_, project_conv
from .conv_sample_grads import SPECS as CONV_SAMPLE_GRADS_SPECS
from .conv_sample_grads import conv_sample_grads
from .dispatch import eager, runs_kernel
from .expand_factored import SPECS as EXPAND_SPECS
from .expand_factored import expand_update_, factors_products
from .expand_rows import SPECS as EXPAND_ROWS_SPECS
from .expand_rows import expand_rows_update_, rows_products
from .gram import SPECS as GRAM_SPECS
from .gram import gram, gram_rows
from .launches import launch_place, layout_of, without_memory
from .project_factored import SPECS as PROJECT_SPECS
from .project_factored import project
from .project_rows import SPECS as PROJECT_ROWS_SPECS
from .project_rows import project_rows
from .repeated import ProductLaunches, RepeatedProducts, may_repeat
from .sample_grads import SPECS as SAMPLE_GRADS_SPECS
from .sample_grads import sample_grads
from .spec import KernelSpec
from .triangular import SPECS as TRIANGULAR_SPECS
from .triangular import cholesky_inverse, cholesky_solve
from .unfold_conv import SPECS as UNFOLD_SPECS
from .unfold_conv import unfold_conv
from .update import update_

# One entry for each op: the tests, the benchmarks and the ahead-of-time compilation iterate over these.
SPECS: tuple[KernelSpec, ...] = (
    *GRAM_SPECS,
    *SAMPLE_GRADS_SPECS,
    *CONV_SAMPLE_GRADS_SPECS,
    *CHOLESKY_SPECS,
    *TRIANGULAR_SPECS,
    *PROJECT_SPECS,
    *EXPAND_SPECS,
    *PROJECT_ROWS_SPECS,
    *EXPAND_ROWS_SPECS,
    *CONV_SPECS,
    *UNFOLD_SPECS,
)

__all__ = [
    "SPECS",
    "KernelSpec",
    "ProductLaunches",
    "RepeatedProducts",
    "cholesky",
    "cholesky_inverse",
    "cholesky_solve",
    "conv_products",
    "conv_sample_grads",
    "eager",
    "expand_conv_update_",
    "expand_rows_update_",
    "expand_update_",
    "factors_products",
    "gram",
    "gram_rows",
    "launch_place",
    "layout_of",
    "may_repeat",
    "project",
    "project_conv",
    "project_rows",
    "rows_products",
    "runs_kernel",
    "sample_grads",
    "unfold_conv",
    "update_",
    "without_memory",
]
