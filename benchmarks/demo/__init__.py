"""How the weights of `petal-kernels demo` are made."""
