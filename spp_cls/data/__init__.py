"""Pictures of any size: index, plan, source, device step, sizes, views, and the datamodule that joins them."""

from .datamodule import IMAGENET_MEAN, IMAGENET_STD, MultiSizeDataModule
from .device import device_step
from .full_image import FullImage
from .index import Index, make_index
from .layouts import Listing
from .plan import Plan
from .views import Views

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "FullImage",
    "Index",
    "Listing",
    "MultiSizeDataModule",
    "Plan",
    "Views",
    "device_step",
    "make_index",
]
