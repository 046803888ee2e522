"""The demo model, fetched the product's own way."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_server.config import Settings

MODEL = "smollm2-135m"


def pulled(model: str) -> Path:
    """The folder of a model, which is pulled if it is not there."""
    pull = [sys.executable, "-m", "mlx_server", "pull", model]
    done = subprocess.run(pull, capture_output=True, text=True)
    assert done.returncode == 0, f"{model} could not be pulled:\n{done.stderr[-4000:]}"
    return Settings.load().models_folder / model


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the demo model."""
    return pulled(MODEL)
