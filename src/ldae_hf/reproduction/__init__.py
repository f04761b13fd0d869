"""The paper's tables and figures, run here: which rows a table has, what is missing of them, and what they say.

`experiments.py` says what a table is, `tables.py` names them all, `verdicts.py` states the rule, `jobs.py` and `run.py`
do what is missing, `estimate.py` says how long that takes, `table.py` and `figure.py` show what there is.
"""
