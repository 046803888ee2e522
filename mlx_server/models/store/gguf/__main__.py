"""SOURCE FOLDER [BITS]: convert the file SOURCE into FOLDER. Exits with `REFUSED` and a reason."""

import sys
from pathlib import Path

from mlx_server.errors import BadRequest
from mlx_server.models.store.gguf import REFUSED
from mlx_server.models.store.gguf.convert import convert


def main(arguments: list[str]) -> int:
    source, folder, *bits = arguments
    try:
        convert(Path(source), Path(folder), int(bits[0]) if bits else None)
    except BadRequest as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
