"""Compressed matrices in a server: which of them a rank holds, and the methods that vLLM calls for its layers.

`shards` is a server's view of a matrix and imports no server. The other modules are for vLLM, which has no stable
interface; all that is used of it is imported in `config`, `linear` and `vocabulary`.
"""
