"""The last hour in charts."""

from collections import deque
from collections.abc import Callable

from nicegui import ui

from mlx_server.ui.api import Api
from mlx_server.ui.browser import Browser
from mlx_server.ui.plots import CHARTS, Chart, Sample, options

HOUR = 3600.0


class HistoryView:
    title, icon = "Charts", "insights"
    seconds = 5.0

    def __init__(self, api: Callable[[], Api], browser: Browser) -> None:
        self._api = api
        self._plots: dict[Chart, ui.echart] = {}
        self._samples: deque[Sample] = deque()

    async def build(self) -> None:
        await self._read()
        with ui.element("div").classes("page wide"), ui.element("div").classes("plots"):
            for chart in CHARTS:
                with ui.element("section").classes("card").props(f'aria-label="{chart.title}"'):
                    ui.label(chart.title).classes("heading")
                    plot = ui.echart(options(chart, list(self._samples))).classes("plot")
                    self._plots[chart] = plot

    async def refresh(self) -> None:
        if not await self._read():
            return
        samples = list(self._samples)
        for chart, plot in self._plots.items():
            plot.options.update(options(chart, samples))
            plot.update()

    async def close(self) -> None:
        """Nothing is open."""

    async def _read(self) -> bool:
        """Whether there is anything new."""
        since = self._samples[-1]["at"] if self._samples else 0.0
        new = await self._api().history(since)
        self._samples.extend(new)
        while new and self._samples[0]["at"] < new[-1]["at"] - HOUR:
            self._samples.popleft()
        return bool(new)
