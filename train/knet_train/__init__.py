"""K-Net (arXiv 2106.14855) in PyTorch: model, data, training, checkpoints."""
