"""Capture: what one forward and backward pass of the model records for the rows of J.

In the order of a step: `hooks` watch the forward; a `record` stores every layer call; `rows/attribution` finds the
parameters whose rows do not follow from these calls; `likelihood_grads` (sampled and exact Fisher) or `loss_grads`
(empirical Fisher) say where backward passes start, and `output_grads` runs them; `rows/explicit` finds the rows of
parameters without a rule, and `rows/proof` compares all rows with autograd. `counted` knows which forwards count.
"""
