"""The engine: pages of keys and values, a scheduler, a runner, and sampling.

One engine serves data generation, evaluation, the server and the chat. Read in this order:
request → pages → sequence → scheduler → cache → placed → paged → runner → sampling → speculation →
intake → engine → loaded; and for a GPU tiled → triton_attention → graphs.
"""
