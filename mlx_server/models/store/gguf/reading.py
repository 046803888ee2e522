"""What a GGUF file holds: metadata, and tensors that stay on the disk until they are asked for."""

from pathlib import Path
from typing import Any

from gguf import GGUFReader, ReaderTensor

from mlx_server.errors import BadRequest, reason


class GgufFile:
    """`tensors` by name. Raises BadRequest for a file that is no whole model."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadRequest("it is not a GGUF file")
        try:
            reader = GGUFReader(path)
            self._metadata = {name: one.contents() for name, one in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
            # What the reader raises for damaged files.
            raise BadRequest(f"it cannot be read ({reason(error)})") from error
        self.tensors: dict[str, ReaderTensor] = {one.name: one for one in reader.tensors}
        self.architecture = str(self._metadata.get("general.architecture"))
        if self._metadata.get("split.count", 1) > 1:
            raise BadRequest("it is one part of several; join them with gguf-split first")

    def get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(name, default)

    def option(self, name: str, default: Any = None) -> Any:
        """The architecture's own `name`."""
        return self._metadata.get(f"{self.architecture}.{name}", default)

    def value(self, name: str) -> Any:
        """The same, a number or text that must be there. Raises BadRequest."""
        found = self.option(name)
        if found is None or isinstance(found, list):
            raise BadRequest(f"its metadata has no usable {self.architecture}.{name}")
        return found

    def decimal(self, name: str) -> float:
        """Via decimal text: 1e-5, not the nearest float32."""
        return float(f"{self.value(name):.6g}")
