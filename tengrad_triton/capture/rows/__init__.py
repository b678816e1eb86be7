"""Rows: how the rows of each parameter follow from the record of a forward, and the proof that they are right.

`attribution` decides which parameters get their rows from the calls of their layers. `rule` applies the layers' rules
to these calls, `explicit` finds rows without a rule, by `rerun` or from autograd's graph. `proof` compares all of them
with autograd. `graph` reads the graph of a forward.
"""
