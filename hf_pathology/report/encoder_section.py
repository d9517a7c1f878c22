"""The parts of a report that show what an encoder sees, and what a slide classifier looks at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluation.cross_validation import CrossValidation
from ..evaluation.intervals import Interval
from ..features.encoder import Encoder
from ..slides.cohort import CohortSlide
from ..slides.grid import TileGrid
from .attention import attention_maps, draw_attention
from .comparison import auc_figure, comparison_table, roc_figure
from .heatmap import draw_scale_bar, panels
from .images import jpeg_uri, pixels_of, shrunk
from .page import Picture, Section
from .pca import SlidePatches, draw_patches, fit_colours, read_patches
