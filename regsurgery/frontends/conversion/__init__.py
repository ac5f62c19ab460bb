"""What is not a folder of safetensors under a library's own names becomes one, in a scratch folder.

`files.py` tells the story: a weights file is read, its tensors are given to the library of `--arch`, whose own loader
must take them all, and the library's own layout is written. A file here for each library. What comes after is as for
any checkpoint folder.
"""
