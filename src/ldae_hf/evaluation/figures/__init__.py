"""The paper's figures from any run, encoder, processor or ledger, as matplotlib figures; `ldae figure` writes them.

Made for print: 3.3 or 6.9 inches wide with words of 7.5 points, in colours that colour-blind people tell apart and that
differ in grey by marks and dashes (style).
"""

from .curve import curve_figure, curve_panels
from .features import features_figure
from .filters import filters_figure
from .noise import noise_figure
from .path import path_bars, path_figure, path_steps
from .restoring import denoising_figure, pipeline_figure
from .schedules import schedules_figure
from .spectrum import spectrum_figure
from .style import save_both, save_figure


__all__ = [
    "curve_figure",
    "curve_panels",
    "denoising_figure",
    "features_figure",
    "filters_figure",
    "noise_figure",
    "path_bars",
    "path_figure",
    "path_steps",
    "pipeline_figure",
    "save_both",
    "save_figure",
    "schedules_figure",
    "spectrum_figure",
]
