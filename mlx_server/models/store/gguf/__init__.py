"""GGUF files to MLX folders, in a process of its own: `python -m mlx_server.models.store.gguf`."""

REFUSED = 3
"""The process's exit status for an unsupported file."""
