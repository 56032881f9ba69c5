"""How the GPU acceptance command runs its steps: one worker, a watchdog, a journal, a record.

The steps themselves are in qmix.evals.steps; nothing here knows what one measures.
"""
