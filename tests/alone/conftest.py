"""What watches the clock, memory or load: `make test` runs these with nothing beside them."""

from tests.support.demo import demo_model

__all__ = ["demo_model"]
