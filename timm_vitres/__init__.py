"""Hybrids of ResNet and Vision Transformer for timm: importing this registers the models."""

from .vitresnet import VitResNet, VitResNetCfg

__version__ = '0.1.0'
__all__ = ['VitResNet', 'VitResNetCfg']
