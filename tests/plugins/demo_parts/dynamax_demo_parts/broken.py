"""A policy that cannot be imported."""

raise RuntimeError("its licence file is missing")
