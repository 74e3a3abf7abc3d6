"""The table of routes, in the order of the plan's columns; of two that cost the same, the plan takes the first."""

from __future__ import annotations

from titan_hd.distributed.update.dense import DenseRoute
from titan_hd.distributed.update.factors import FactorsRoute
from titan_hd.distributed.update.route import Route

ROUTES: dict[str, Route] = {route.name: route for route in (FactorsRoute(), DenseRoute())}
