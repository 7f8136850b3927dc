"""Time models against each other, and the data that they are fed with.

Each model has a process of its own (:mod:`.worker`), since allocators and peak memory
belong to processes; :mod:`.rounds` asks them in turn, so that what happens to the
machine happens to all of them.
"""
