"""Backbones: language models that run any span of their blocks. Knows neither heads nor policies."""
