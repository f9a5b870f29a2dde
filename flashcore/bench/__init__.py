"""Measuring FlashCore: named shapes, peers, timing, records, and the tables and plots drawn from them.

Each line uses those above it, and never one below:

``machine``, ``cases``, ``models``     where, and what
``timing``, ``check``, ``record``      how long it takes, whether an answer is right, what is written down
``peers``, ``gemm``, ``backward``      against whom; what two operations need of their own
``operations``                         inputs, right answer and plan of each operation
``e2e``, ``startup``, ``parallel``     running: whole models, processes, two GPUs
``suites``                             running everything
``shapes``, ``tables``, ``plot``       records shown: the best peer of a shape, tables, plots
``profile``, ``roofline``              where cycles go: as Nsight Compute counts, as the chip's rates say
``documents``                          records in the documentation
"""
