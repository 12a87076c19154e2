"""Distillation in JAX: large teachers into small or few-step students."""

__version__ = "0.1.0"
