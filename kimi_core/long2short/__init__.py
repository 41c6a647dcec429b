"""Shorter answers from a model that thinks long (section 2.4).

Here is what the methods compute and how they are compared; ``run/long2short.py`` carries them out.
"""

METHODS = ("merge", "shortest", "dpo", "rl")
"""Weight merging, shortest rejection sampling, DPO, and RL with the length reward."""
