"""The paper's tables, figures and claims (arXiv 2402.01093), and ours beside them."""

from planearly.studies.paper.claims import CLAIMS
from planearly.studies.paper.tables import TABLES, worth
from planearly.study.spec import Suite

SUITE = Suite(TABLES, CLAIMS, worth)
