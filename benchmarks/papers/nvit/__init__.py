"""NViT pruning against other criteria and against Torch-Pruning, at a scale that two CPU cores can repeat."""
