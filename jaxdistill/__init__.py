"""Distillation in JAX: large teachers into small or few-step students."""
