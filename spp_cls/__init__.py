"""Train image classifiers that take any image size: SPP-net (He et al. 2014) on Lightning and Hydra."""

import os

__version__ = "0.1.0"

# Torch on a CPU asks the system for large tensors anew each time, and to lay out their pages costs more than many an
# operation on them. In pages of 2 MB a training step takes three quarters of the time; no bit changes. Torch reads
# this when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
