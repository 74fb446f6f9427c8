"""Evaluation of classifiers: figures, labels of ImageNet, tables and plots."""

from .evaluation import evaluate

__all__ = ["evaluate"]
