"""The rooms: one folder per method, each removable by itself.

A room holds its card (the docstring of its ``__init__.py``), ``config.py``, one or two files of pure maths, and one
entry file that says what the room does: ``apply.py`` changes a model, ``objective.py`` gives a loss, ``pipeline.py``
drives a process. A room imports no other room. ``trimtab methods`` lists the cards.
"""
