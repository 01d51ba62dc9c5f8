"""Cases for the exercises of the course, one module for each notebook.

A function that is named like the reader's returns pairs ``(arguments, expected)`` for
``tools.course.check``. The arguments are drawn from a seed, and what is expected is computed by the
library or by another formula than the solution's. They are chosen so that plausible mistakes
(padding that counts, a shift by one, a mean without weights, an argument that is ignored) give a
wrong number in at least one case; ``tests/test_exercises.py`` has a table of such mistakes.
"""
