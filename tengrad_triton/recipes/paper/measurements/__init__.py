"""What `tengrad-triton paper` measures beside runs: costs, blocks of the inverse, phases of a step, peak memory."""
