"""`regsurgery survey`: a table over many models, which can be killed and continued.

`listed.py` reads the list, `stages.py` decides what is to be done next for a model, by the records that lie there
(`records.py`), `apart.py` runs it in a process of its own, `work.py` is what that process does, `survey.py` puts them
together, `tables.py` and `pages.py` show the outcome.
"""
