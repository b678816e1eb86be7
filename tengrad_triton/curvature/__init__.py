"""From captured calls to the factored Fisher blocks, and the natural-gradient step along them."""
