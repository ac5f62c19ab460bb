"""Third-party tools on patched folders, as their users call them; each check also runs on the stock model.

Tier `slow`. A tool that is not installed is skipped: `pip install peft torchao bitsandbytes grad-cam captum openvino
onnxconverter-common onnxsim clip-benchmark executorch litert-torch` adds those that are tried here. After tools that
change weights, outliers must still be gone.
`docs/tools.md` has the figures, which `python -m tests.clients` prints.
"""
