"""Pages that need nothing beside themselves: what the report of a run and that of evaluations share.

``document.py`` writes the frame ``page.html`` and the data into it; ``page.css`` is the look, ``elements.js``
makes elements, ``axes.js`` and ``pass_curves.js`` charts. Reports add their own styles and scripts.
"""
