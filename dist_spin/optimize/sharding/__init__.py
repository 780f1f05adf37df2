"""Sharding of the frozen weights while rotations are learned (FSDP2 or DeepSpeed ZeRO-3), and what fits into memory."""
