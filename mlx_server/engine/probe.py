"""`python -m mlx_server.engine.probe`: MLX's device here, as JSON.

A process of its own, so that the front never touches a device.
"""

import msgspec

from mlx_server.engine.memory import read_device

if __name__ == "__main__":
    print(msgspec.json.encode(read_device()).decode())
