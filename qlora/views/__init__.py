"""What the verbs show: tables and text for a terminal, made from plain data. Nothing is printed here."""

from qlora.views.cache import cache_view, cleared_view
from qlora.views.data import data_view, findings_view, lengths_view
from qlora.views.hub import parcel_view, pushed_lines
from qlora.views.inspection import inspection_view
from qlora.views.plans import compare_view, models_view, num_parameters, plan_view
from qlora.views.preflight import preflight_view

__all__ = [
    "cache_view", "cleared_view", "compare_view", "data_view", "findings_view", "inspection_view", "lengths_view", "models_view",
    "num_parameters", "parcel_view", "plan_view", "preflight_view", "pushed_lines",
]
