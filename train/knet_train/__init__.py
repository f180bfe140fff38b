"""K-Net in PyTorch: networks, data, training, evaluation."""
