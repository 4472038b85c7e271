"""Column-sparse kernels for diffusion transformers."""
