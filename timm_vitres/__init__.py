"""Hybrids of ResNet and Vision Transformer for timm: importing this registers the models."""

from . import vitresnet as _vitresnet  # noqa: F401  (registers)
from .data import preprocess
from .hub import push, save, verify
from .vitresnet import VitResNet, VitResNetCfg

__version__ = '0.1.0'
__all__ = ['VitResNet', 'VitResNetCfg', 'preprocess', 'push', 'save', 'verify']
