"""Triton kernels and their launch code, installed as `pera_fast.kernels`.

Only `pera_fast.ops` calls them. Importing this package needs no Triton: each kernel module imports it itself.
Launches ask for fused multiply-adds, which Triton leaves out from 3.10 on unless it is asked.
"""
