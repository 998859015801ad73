"""Triton kernels and their launch code, installed as `pera_fast.kernels`.

Only `pera_fast.ops` calls them. Importing this package needs no Triton: each kernel module imports it itself.
"""
