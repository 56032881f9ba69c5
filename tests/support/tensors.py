"""A few tensors of every kind of size and dtype that a file has to store."""

import torch

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "blob": torch.arange(7, dtype=torch.uint8),
    "b": torch.arange(5).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "none": torch.empty(0, 4, dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.float16),
}
