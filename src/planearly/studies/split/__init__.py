"""Pay before the domain is known, after, or both: the ways to spend one budget, side by side."""

from planearly.studies import paper
from planearly.studies.split.claims import CLAIMS
from planearly.studies.split.tables import TABLES, cheapest
from planearly.study.spec import Suite

SUITE = Suite([*TABLES, *paper.SUITE.tables], CLAIMS, cheapest)
