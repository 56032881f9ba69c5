"""EleutherAI's lm-evaluation-harness over qmix: its model class, and the tasks of local files.

Knows nothing of layer-by-layer scoring: the whole model is loaded. It needs the extra `lm-eval`.
"""
