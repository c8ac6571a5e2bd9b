"""Planned against measured: cells (a model under a budget) are planned, trained for real, and written down one line each.

`qlora measure` is the command. `cells` says what a cell is, `one_cell` measures one, `flow` many, each in a process of its own
(`child`); `lines` reads what was written, and `summary` says what it comes to. Nothing is downloaded.
"""
