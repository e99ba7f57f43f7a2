"""Kernels and the beam search on an NVIDIA GPU; `fastmrc.ops` and the readers choose them."""
