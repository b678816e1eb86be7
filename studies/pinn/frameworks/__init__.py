"""PINA and DeepXDE on the problems of the study, run as their documentation says."""
