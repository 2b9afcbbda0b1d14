"""Models to and from other people's libraries: weights as they are read, written, described and run elsewhere.

weight_source.py       a checkpoint's weights, whatever its form, as runs of mapped files
safetensors_stream.py  runs to safetensors files of a bounded size
hugging_face.py        the folder that transformers loads: written, and read back
modelling_code.py      ``model/`` as the flat files that transformers copies
configuration_ice.py   the configuration transformers reads (exported; nothing here imports it)
modeling_ice.py        the model transformers runs (likewise)
imported_run.py        an exported folder as a run directory
"""
