"""The command line of knet-deploy."""
