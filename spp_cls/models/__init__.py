"""Nets that take any image size; they need torch alone, so that anyone can lift them out."""

from .backbones import BACKBONES, Backbone, Conv, Norm, Pool
from .initialise import initialise
from .norm import LocalResponseNorm, across_channels, within_channel
from .pyramid import SpatialPyramidPool2d, spatial_pyramid_pool2d
from .sppnet import SPPNet, sppnet

__all__ = [
    "BACKBONES",
    "Backbone",
    "Conv",
    "LocalResponseNorm",
    "Norm",
    "Pool",
    "SPPNet",
    "SpatialPyramidPool2d",
    "across_channels",
    "initialise",
    "sppnet",
    "spatial_pyramid_pool2d",
    "within_channel",
]
