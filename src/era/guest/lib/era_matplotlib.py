"""matplotlib's backend in a sandbox, where nobody looks at a window: `plt.show()` saves the open figures as files.

MPLBACKEND names it, so it is matplotlib that imports it. A figure goes into the working directory as figure-1.png, or
by the next number that is free: what is there already, whoever made it, stays.
"""

from __future__ import annotations

import io
from contextlib import suppress
from itertools import count

from matplotlib._pylab_helpers import Gcf
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg


class FigureManager(FigureManagerBase):  # type: ignore[misc]  # it comes with the session's packages
    def show(self) -> None:
        """Save this figure."""
        content = io.BytesIO()
        self.canvas.figure.savefig(content, format="png")
        for number in count(1):
            with suppress(FileExistsError), open(f"figure-{number}.png", "xb") as file:
                file.write(content.getbuffer())
                return

    @classmethod
    def pyplot_show(cls, *, block: bool | None = None) -> None:
        """Save all figures and close them, as somebody does who has looked at them.

        A program that doesn't wait for that (`plt.pause` in an animation) keeps them open and unsaved.
        """
        if block is False:
            return
        for manager in Gcf.get_all_fig_managers():
            manager.show()
        Gcf.destroy_all()


class FigureCanvas(FigureCanvasAgg):  # type: ignore[misc]  # likewise
    manager_class = FigureManager
