"""The engine: pages of keys and values, a scheduler, a runner, and sampling.

One engine serves data generation, evaluation, the server and the chat. Read in this order:
request → pages → sequence → scheduler → sampling → reading → intake → engine → loaded; how a step is computed
store → runner → native (packaged, kept, compiled), or by PyTorch cache → placed → paged → plain, and for a GPU
tiled → triton_attention → graphs; beside them speculation, adapters, grammar, score. All but the PyTorch way is
imported without torch.
"""
