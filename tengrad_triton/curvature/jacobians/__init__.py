"""The J of one parameter in each of its representations."""
