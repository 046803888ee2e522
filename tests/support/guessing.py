"""`python -m tests.support.guessing FD`: an engine that guesses whenever it can.

Whether guesses pay depends on how fast passes are, on which no test may depend.
"""

from mlx_server.engine import worker
from mlx_server.engine.protocol import Load, Ready
from mlx_server.engine.ranks.followers import Followers
from mlx_server.engine.worker import Work


def main() -> None:
    load = worker.load

    def load_guessing(message: Load, followers: Followers | None = None) -> tuple[Work, Ready]:
        work, ready = load(message, followers)
        from mlx_server.engine.schedule.planner import Planner, _chances

        def always(planner: Planner, rows: list[object]) -> dict[int, int]:
            return {id_: chance.most for id_, chance in _chances(rows).items()}

        Planner._guesses = always
        return work, ready

    worker.load = load_guessing
    worker.main()


if __name__ == "__main__":
    main()
