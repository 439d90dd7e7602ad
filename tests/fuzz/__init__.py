"""A fuzzer of the operators: calls drawn from everything that a signature allows, each checked
against formulas of its own.

``make fuzz CALLS=N SEED=S`` runs it (``python -m tests.fuzz`` has more options), and the test suite
runs a share of it. One integer and an index fix a case, so a failure prints itself as a script.

* ``case.py``: how a case is drawn and laid out in memory; ``draw_*.py``: one generator for each
  operator, from its public signature.
* ``formulas.py``, ``masks.py``: what the operators compute, written from the table of
  docs/kernels.md and the docstrings, apart from every ``reference.py`` and from ``_runtime``: an
  error there is found too.
* ``judge.py``: the rule, vectorised; ``check.py``: one case on some backends, with every check.
* ``worker.py``, ``__main__.py``: processes, crashes, hangs, the report.

A *call* is one operator call on one backend, forward and, where a gradient was asked for, backward,
that ran through the checks. Repeats for determinism, threads or a second look are not counted, and
neither are calls that a backend declined.
"""
