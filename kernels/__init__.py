"""The tensor operations behind a TENGraD step: Triton kernels with their definitions in PyTorch beside them.

Every public name here is an op of ``torch.library``. On CPU tensors (and in float64) it runs its definition, the
``*_reference`` function of the same signature; on CUDA tensors it launches the Triton kernel. Sums over half-precision
entries are taken and returned in float32; per-sample gradients are stored in the dtype of the inputs.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient, L blocks.
"""

from .cholesky import SPECS as CHOLESKY_SPECS
from .cholesky import cholesky
from .gram import SPECS as GRAM_SPECS
from .gram import gram, gram_rows
from .project_factored import SPECS as REUSE_SPECS
from .project_factored import project
from .project_rows import SPECS as ROWS_SPECS
from .project_rows import project_rows
from .expand_rows import SPECS as ROWS_UPDATE_SPECS
from .expand_rows import expand_rows_update_
from .expand_factored import SPECS as REUSE_UPDATE_SPECS
from .expand_factored import expand_update_
from .sample_grads import SPECS as SAMPLE_GRADS_SPECS
from .sample_grads import conv_sample_grads, sample_grads
from .spec import KernelSpec
from .triangular import SPECS as TRIANGULAR_SPECS
from .triangular import cholesky_inverse, cholesky_solve
from .update import update_
from .conv import SPECS as WINDOWS_SPECS
from .conv import expand_conv_update_, project_conv

# One row a kernel: the tests, the benchmarks and the ahead-of-time compile iterate over these.
SPECS: tuple[KernelSpec, ...] = (
    *GRAM_SPECS,
    *SAMPLE_GRADS_SPECS,
    *CHOLESKY_SPECS,
    *TRIANGULAR_SPECS,
    *REUSE_SPECS,
    *REUSE_UPDATE_SPECS,
    *ROWS_SPECS,
    *ROWS_UPDATE_SPECS,
    *WINDOWS_SPECS,
)

__all__ = [
    "SPECS",
    "KernelSpec",
    "cholesky",
    "cholesky_inverse",
    "cholesky_solve",
    "conv_sample_grads",
    "expand_rows_update_",
    "expand_update_",
    "expand_conv_update_",
    "gram",
    "gram_rows",
    "project",
    "project_rows",
    "project_conv",
    "sample_grads",
    "update_",
]
