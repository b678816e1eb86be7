"""Capture: what one forward and backward pass of the model records for the rows of J.

In the order of a step: `hooks` watch the forward; a `record` stores every layer call; `attribution` finds the
parameters whose rows do not follow from these calls; `output_grads` (sampled and exact Fisher) or `loss_grads`
(empirical Fisher) add the output gradients; `explicit_rows` finds the rows of parameters without a rule.
"""
