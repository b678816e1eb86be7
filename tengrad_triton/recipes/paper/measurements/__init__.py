"""What `tengrad-triton paper` measures beside training runs: costs, inverse blocks, phases of a step and peak memory."""
