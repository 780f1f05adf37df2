"""Who owns the memory while rotations are learned: FSDP2 or DeepSpeed ZeRO-3, and how much of it fits."""
