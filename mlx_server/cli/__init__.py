"""The command line."""

import os

# Pydantic imports it with its first model, for half a second; none of ours asks for it.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "logfire-plugin")
