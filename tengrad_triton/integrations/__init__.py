"""What trainers of other packages need to use `TENGraD`: likelihoods of their labels, and callbacks that log its stats.

Each module imports the package that it is named after; this one imports none.
"""
