"""The steps of the GPU acceptance command (qmix.evals.gpu), a file each, and what they share.

The entry point of a step is `results(device)`, which yields JSON objects as they are measured.
Knows nothing of budgets, processes or records.
"""
