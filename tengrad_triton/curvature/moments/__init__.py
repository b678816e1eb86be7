"""D of scaled damping from the rows and the gradients of refreshes (docs/math.md, M17).

`second` has the second moments of one refresh, `running` their means over refreshes, and `scales` the D of those.
"""

from tengrad_triton.curvature.moments.running import AllMoments, Grads, Moments, Scaling, updated_moments
from tengrad_triton.curvature.moments.scales import scales_of

__all__ = ["AllMoments", "Grads", "Moments", "Scaling", "scales_of", "updated_moments"]
