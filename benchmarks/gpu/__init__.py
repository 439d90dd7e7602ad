"""The GPU suite: everything that only a GPU can show, in one bounded and resumable run.

`python -m benchmarks.gpu --minutes 25 --out DIR`. A stage is a module of `stages`: its
cases, how one runs and what is reported of it. `command` parses and drives, `clock` divides the
time, `pool` keeps the child processes that run the cases (`worker`), `journal` keeps what they
found, `summary` turns that into the files people read.
"""
