"""Measurements of mlx-server beside its peers. Not part of the installed package."""
