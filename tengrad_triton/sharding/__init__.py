"""Models of which each process has a part (`torch.distributed.fsdp.fully_shard`), and sums over these parts."""
