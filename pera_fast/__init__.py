"""PerA pre-training for remote-sensing images, and the kernels it is made of.

pera_fast.ops        the kernels' public functions, usable in any student/teacher trainer
pera_fast.reference  what they compute, in plain PyTorch
pera_fast.config     presets and settings
python -m pera_fast.train | evaluate | report | stats | info
"""

__version__ = "0.1.0"
