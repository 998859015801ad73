"""This project's own eager version of the authors' data flow: what the kernels are measured against."""
