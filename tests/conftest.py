"""One thread: the networks of the tests are too small to gain from more."""

import torch

torch.set_num_threads(1)
