"""`hf-fpdt bench`: steps of several ways to train one model, side by side, each in a process of its own.

Read in this order: `driver` asks for one job after another, `children` runs each in a fresh process, `child` is that
process, `parity` and `measure` are what it does, `peers`, `ring`, `alst_sp` and `catalogue` are the ways to train,
`figures` makes speeds comparable, `report` writes them down. On several GPUs torch's launcher starts a child for each:
`lifeline` ties it to the parent, `world` is what the children are to one another, `spread` puts a model on them.
"""
