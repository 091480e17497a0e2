"""Settings of every test: one thread, because the tensors are tiny and the processes are many."""

import torch

torch.set_num_threads(1)
