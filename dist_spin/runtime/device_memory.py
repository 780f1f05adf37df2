"""How much memory a GPU still has for this process."""

import torch


def device_bytes_free(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses, what torch keeps for later among them."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached
