"""How the plots of a report look: colours that everyone can tell apart, sizes that survive a laptop and a printer."""

from contextlib import AbstractContextManager

import matplotlib


# Okabe and Ito's colours, which colour-blind readers can tell apart (jfly.uni-koeln.de/color), the main result first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
WIDTH = 9.6  # inches of a plot over the whole page, so that its letters are as large as those of the next one
INK, MUTED, FAINT = "#1c2430", "#5a6472", "#d5dae1"
PLOT_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that a plot looks the same everywhere
    "font.size": 9.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.7,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "svg.fonttype": "path",
    "svg.hashsalt": "hf_pathology",  # the same data give the same file
}


def plot_style() -> AbstractContextManager:
    """A context, and a decorator, in which plots are drawn: fonts, colours and lines of the report."""
    return matplotlib.rc_context(PLOT_STYLE)
