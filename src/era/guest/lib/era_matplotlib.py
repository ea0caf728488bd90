"""matplotlib's backend in a sandbox, which has no windows: `plt.show()` saves the open figures as files.

MPLBACKEND names it, so it is matplotlib that imports it. era_results says under which names figures are saved.
"""

from __future__ import annotations

import io

import era_results
from matplotlib._pylab_helpers import Gcf
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save(figure: Figure) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    era_results.write("figure", "png", content.getvalue())


class FigureManager(FigureManagerBase):  # type: ignore[misc]  # matplotlib comes with the session's packages
    def show(self) -> None:
        """Save this figure."""
        save(self.canvas.figure)

    @classmethod
    def pyplot_show(cls, *, block: bool | None = None) -> None:
        """Save all open figures, and close them.

        A program that doesn't wait for that (`plt.pause` in an animation) keeps them open and unsaved.
        """
        if block is False:
            return
        for manager in Gcf.get_all_fig_managers():
            manager.show()
        Gcf.destroy_all()


class FigureCanvas(FigureCanvasAgg):  # type: ignore[misc]  # likewise
    manager_class = FigureManager
