"""A local page that shows runs: ``kimi dashboard runs/``.

It reads files of run folders and nothing else. It opens them for reading, takes no lock, imports
nothing of the run, and needs no torch. ``docs/dashboard.md`` shows the pages.
"""
