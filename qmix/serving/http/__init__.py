"""HTTP: the API that OpenAI's clients speak, over one engine. Needs the extra `serve`.

Knows no schedule and no layers: `qmix.serving` runs what is asked for.
"""
