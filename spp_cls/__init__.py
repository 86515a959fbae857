"""Train image classifiers that take any image size: SPP-net (He et al. 2014) on Lightning and Hydra."""

__version__ = "0.1.0"
