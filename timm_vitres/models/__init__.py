"""What a hybrid is: configs, ResNets, shared layers, the families, and how a variant is built and loaded."""
