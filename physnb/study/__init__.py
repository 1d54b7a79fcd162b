"""The study behind 08_findings: a plan written first, parts that each leave a table, verdicts by rule."""

from physnb.study.plan import FORMS, HYPOTHESES, PLANS, STOPPING_RULE, Form, Hypothesis, StudyPlan
from physnb.study.run import PARTS, compare, read_tables, run_study
from physnb.study.verdicts import Verdict, judge

__all__ = [
    "FORMS",
    "HYPOTHESES",
    "PARTS",
    "PLANS",
    "STOPPING_RULE",
    "Form",
    "Hypothesis",
    "StudyPlan",
    "Verdict",
    "compare",
    "judge",
    "read_tables",
    "run_study",
]
