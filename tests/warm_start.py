"""What each program does once and remembers; `processes.py` has its server do it for all forks."""

from __future__ import annotations

import io

import PIL.Image
import processes  # noqa: F401
from matplotlib.figure import Figure

from ablation import running  # noqa: F401
from config.source_code import fingerprint_code
from evaluation import page, viewer
from evaluation.charts import render
from evaluation.viewer_library import find_library
from training.model_card import template

# Reading all source files takes as long as a few steps of training.
fingerprint_code("sam_lora_image_encoder")
template()
for module in (page, viewer):
    page.templates_of(module.TEMPLATE.parent).get_template(module.TEMPLATE.name)
if library := find_library():
    assert library.packed
PIL.Image.preinit()
figure = Figure()
figure.subplots().set_title("fonts")
render(figure, io.BytesIO(), format="png")
render(figure, io.BytesIO(), format="svg")
