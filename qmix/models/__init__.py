"""The public models, and how they are loaded, packed, offloaded and saved.

The interface is that of Hugging Face's Mixtral, called "the Hugging Face page" elsewhere:
https://huggingface.co/docs/transformers/v4.38.1/en/model_doc/mixtral

Knows no command, and no option but those of loading. Shape letters as in qmix.nn.
"""
