import torch

torch.set_num_threads(1)  # tensors of a few hundred numbers: threads would only wait for each other
