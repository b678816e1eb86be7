"""What one forward and backward pass of the model leaves behind for the rows of J.

In the order of a step: `hooks` watch the forward; a `record` stores every layer call; `attribution` finds the
parameters that these calls do not account for; `output_grads` (sampled and exact Fisher) or `loss_grads` (empirical
Fisher) add the derivatives with respect to the layers' outputs; `explicit_rows` finds the rows that no rule describes.
"""
