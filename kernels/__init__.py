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
from .reuse import SPECS as REUSE_SPECS
from .reuse import project
from .reuse_rows import SPECS as ROWS_SPECS
from .reuse_rows import project_rows
from .reuse_rows_update import SPECS as ROWS_UPDATE_SPECS
from .reuse_rows_update import expand_rows_update_
from .reuse_update import SPECS as REUSE_UPDATE_SPECS
from .reuse_update import expand_update_
from .sample_grads import SPECS as SAMPLE_GRADS_SPECS
from .sample_grads import conv_sample_grads, sample_grads
from .spec import KernelSpec
from .triangular import SPECS as TRIANGULAR_SPECS
from .triangular import cholesky_inverse, cholesky_solve
from .update import update_
from .windows import SPECS as WINDOWS_SPECS
from .windows import expand_windows_update_, project_windows

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
    "expand_windows_update_",
    "gram",
    "gram_rows",
    "project",
    "project_rows",
    "project_windows",
    "sample_grads",
    "update_",
]
