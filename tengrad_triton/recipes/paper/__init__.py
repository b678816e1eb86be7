"""`tengrad-triton paper`: the paper's tables and figures, as `train` runs and measurements, its numbers beside ours."""
