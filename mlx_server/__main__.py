"""`python -m mlx_server` is the `mlx-server` command."""

from mlx_server.cli.app import main

if __name__ == "__main__":
    main()
