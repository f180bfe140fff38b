"""The torch-free edge runtime of knet-deploy: bundle in, trusted class maps out."""
