"""The admin API's own wire formats."""

from mlx_server.schemas.openai import Lenient, NonEmpty


class PullRequest(Lenient):
    """The body of `POST /admin/models/pull`."""

    model: NonEmpty
