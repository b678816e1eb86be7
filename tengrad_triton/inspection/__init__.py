"""What the optimizer holds, as dense tensors for people to look at; and the check of a rule against autograd."""
