"""Measuring FlashCore: named shapes, peers, timing, records, and the tables and plots drawn from them.

``cases`` says what is measured, ``peers`` against whom, ``check`` whether an answer is right, ``timing`` how long it
takes, ``suites`` puts them together, ``record`` writes the result down, ``report`` turns records into documentation.
"""
