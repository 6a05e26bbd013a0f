"""Transforms of images as values. The loader applies them; its seed determines every random choice."""

from __future__ import annotations

from dataclasses import dataclass

from advmoe import rust_router
from advmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CropFlip:
    """Random crop of the image's own size after padding with zeros, then a random mirror: CIFAR's augmentation."""

    padding: int = 4
    """Pixels added on each side."""
    flip: bool = True
    """Mirror half of the images."""

    def __post_init__(self) -> None:
        if not 0 <= self.padding < 2**31:
            raise ConfigError(f"expected padding >= 0, got {self.padding}")


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A random part of the image, resized (antialiased, bilinear), then a random mirror: ImageNet's augmentation.

    The part is chosen like in torchvision's transform of the same name.
    """

    size: int | tuple[int, int] = 224
    """Height and width of the result; one number for both."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest part of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width / height."""
    flip: bool = True
    """Mirror half of the images."""

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1] < float("inf")):
            raise ConfigError(f"expected rising scale in (0, 1] and ratio > 0, got {self.scale} and {self.ratio}")


@dataclass(frozen=True, kw_only=True)
class ResizeCenterCrop:
    """Resizes the shorter side (antialiased, bilinear), then cuts out the middle: the usual evaluation on ImageNet."""

    size: int | tuple[int, int] = 224
    """Height and width of the result; one number for both."""
    resize: int = 256
    """Length of the shorter side before the middle is taken."""

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not max(_sides(self.size)) <= self.resize < 2**16:
            raise ConfigError(f"expected resize from {max(_sides(self.size))} to {2**16 - 1}, got {self.resize}")


Transform = CropFlip | RandomResizedCrop | ResizeCenterCrop


def output_size(transform: Transform | None) -> tuple[int, int] | None:
    """Height and width after a transform; None if images keep their own size."""
    return _sides(transform.size) if isinstance(transform, RandomResizedCrop | ResizeCenterCrop) else None


def compiled(transform: Transform | None) -> rust_router.Transform:
    """The transform in Rust."""
    match transform:
        case None:
            return rust_router.Transform.as_they_are()
        case CropFlip(padding=padding, flip=flip):
            return rust_router.Transform.crop_flip(padding, flip)
        case RandomResizedCrop(scale=scale, ratio=ratio, flip=flip):
            return rust_router.Transform.random_resized_crop(scale, ratio, flip)
        case ResizeCenterCrop(resize=resize):
            return rust_router.Transform.resize_center_crop(resize)


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _check_size(size: int | tuple[int, int]) -> None:
    if not all(1 <= side < 2**16 for side in _sides(size)):
        raise ConfigError(f"expected a size of 1 to {2**16 - 1} pixels, got {size}")
