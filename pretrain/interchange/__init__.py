"""Models to and from other people's libraries: weights as they are read, written, described and run elsewhere.

    weight_source.py       a checkpoint's weights, whatever its form, a piece at a time
    safetensors_stream.py  pieces to safetensors files of a bounded size
    modelling_code.py      ``model/`` as the flat files that transformers copies
    configuration_ice.py   the configuration transformers reads (a template: exported, and imported nowhere here)
    modeling_ice.py        the model transformers runs (likewise)
    tokenizer_files.py     a run's tokenizer as a Hugging Face fast tokenizer
"""
